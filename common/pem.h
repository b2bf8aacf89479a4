#ifndef SIMPO_COMMON_PEM_H_
#define SIMPO_COMMON_PEM_H_

#include <openssl/bio.h>
#include <openssl/evp.h>
#include <openssl/x509.h>

#include <memory>
#include <string>

namespace simpo {

using Bio = std::unique_ptr<BIO, decltype(&BIO_free)>;
using Certificate = std::unique_ptr<X509, decltype(&X509_free)>;
using PrivateKey = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;

// Reads `text`, which must outlive it.
Bio BioOf(const std::string& text);

// The next certificate in PEM form. Null: there is none.
Certificate NextCertificate(const Bio& bio);
inline Certificate FirstCertificate(const std::string& text) { return NextCertificate(BioOf(text)); }

// Null: there is none, or one with a pass phrase, for which OpenSSL would ask on a terminal.
PrivateKey PrivateKeyOf(const std::string& text);

// Whether the key is that of the certificate. Neither is null.
bool IsPair(const Certificate& certificate, const PrivateKey& key);

}  // namespace simpo

#endif  // SIMPO_COMMON_PEM_H_
