#include "common/pem.h"

#include <openssl/err.h>
#include <openssl/pem.h>

namespace simpo {

Bio BioOf(const std::string& text) { return {BIO_new_mem_buf(text.data(), static_cast<int>(text.size())), &BIO_free}; }

Certificate NextCertificate(const Bio& bio) {
  Certificate certificate(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr), &X509_free);
  ERR_clear_error();
  return certificate;
}

PrivateKey PrivateKeyOf(const std::string& text) {
  const auto no_phrase = [](char*, int, int, void*) { return -1; };
  PrivateKey key(PEM_read_bio_PrivateKey(BioOf(text).get(), nullptr, no_phrase, nullptr), &EVP_PKEY_free);
  ERR_clear_error();
  return key;
}

bool IsPair(const Certificate& certificate, const PrivateKey& key) {
  const bool fits = X509_check_private_key(certificate.get(), key.get()) == 1;
  ERR_clear_error();
  return fits;
}

}  // namespace simpo
