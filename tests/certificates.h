// Certificates of the tests' own making.
#ifndef SIMPO_TESTS_CERTIFICATES_H_
#define SIMPO_TESTS_CERTIFICATES_H_

#include <gtest/gtest.h>
#include <openssl/ec.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>

namespace simpo {

// A key, and a certificate of it.
struct Identity {
  std::string cert, key;  // PEM
  std::shared_ptr<X509> x509;
  std::shared_ptr<EVP_PKEY> pkey;
};

inline std::string PemOf(const std::function<int(BIO*)>& write) {
  const std::unique_ptr<BIO, decltype(&BIO_free)> bio(BIO_new(BIO_s_mem()), &BIO_free);
  EXPECT_EQ(write(bio.get()), 1);
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio.get(), &data);
  return {data, static_cast<size_t>(size)};
}

// Signed by `issuer`, or by itself without one. `names` as "DNS:localhost,IP:127.0.0.1"; valid from and until so many
// seconds from now.
inline Identity MakeIdentity(const std::string& common_name, const Identity* issuer, const std::string& names,
                             long from_s = -3600, long until_s = 86'400) {
  static std::atomic<long> serial = 1;
  Identity identity;
  identity.pkey.reset(EVP_EC_gen("P-256"), &EVP_PKEY_free);
  identity.x509.reset(X509_new(), &X509_free);
  X509* const x509 = identity.x509.get();
  X509_set_version(x509, 2);
  ASN1_INTEGER_set(X509_get_serialNumber(x509), serial++);
  X509_gmtime_adj(X509_getm_notBefore(x509), from_s);
  X509_gmtime_adj(X509_getm_notAfter(x509), until_s);
  X509_set_pubkey(x509, identity.pkey.get());
  X509_NAME_add_entry_by_txt(X509_get_subject_name(x509), "CN", MBSTRING_UTF8,
                             reinterpret_cast<const unsigned char*>(common_name.c_str()), -1, -1, 0);
  X509* const signer = issuer == nullptr ? x509 : issuer->x509.get();
  X509_set_issuer_name(x509, X509_get_subject_name(signer));
  const auto extend = [&](int nid, const std::string& value) {
    X509V3_CTX context;
    X509V3_set_ctx(&context, signer, x509, nullptr, nullptr, 0);
    X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, nid, value.c_str());
    EXPECT_NE(extension, nullptr) << value;
    X509_add_ext(x509, extension, -1);
    X509_EXTENSION_free(extension);
  };
  if (issuer == nullptr) extend(NID_basic_constraints, "critical,CA:TRUE");
  if (!names.empty()) extend(NID_subject_alt_name, names);
  EXPECT_GT(X509_sign(x509, issuer == nullptr ? identity.pkey.get() : issuer->pkey.get(), EVP_sha256()), 0);
  identity.cert = PemOf([&](BIO* bio) { return PEM_write_bio_X509(bio, x509); });
  identity.key = PemOf([&](BIO* bio) {
    return PEM_write_bio_PrivateKey(bio, identity.pkey.get(), nullptr, nullptr, 0, nullptr, nullptr);
  });
  return identity;
}

}  // namespace simpo

#endif  // SIMPO_TESTS_CERTIFICATES_H_
