// OpenSSL's objects, freed when they go out of scope.
#ifndef PYRAMID_SERVER_SECURITY_OPENSSL_H_
#define PYRAMID_SERVER_SECURITY_OPENSSL_H_

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#include <memory>
#include <vector>

#include "absl/strings/string_view.h"

namespace pyramid {

template <auto kFree>
struct Freer {
  template <typename T>
  void operator()(T* object) const {
    kFree(object);
  }
};

using BioPtr = std::unique_ptr<BIO, Freer<BIO_free>>;
using X509Ptr = std::unique_ptr<X509, Freer<X509_free>>;
using KeyPtr = std::unique_ptr<EVP_PKEY, Freer<EVP_PKEY_free>>;

inline BioPtr BioOf(absl::string_view text) {
  return BioPtr(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

// Every certificate of a PEM text; empty if there is none or one of them is damaged.
inline std::vector<X509Ptr> CertificatesOf(absl::string_view pem) {
  std::vector<X509Ptr> found;
  const BioPtr bio = BioOf(pem);
  while (X509* certificate = PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr)) {
    found.emplace_back(certificate);
  }
  ERR_clear_error();
  return found;
}

// Null: it isn't a private key, or one under a password.
inline KeyPtr PrivateKeyOf(absl::string_view pem) {
  const BioPtr bio = BioOf(pem);
  const auto no_password = [](char*, int, int, void*) { return -1; };
  KeyPtr key(PEM_read_bio_PrivateKey(bio.get(), nullptr, no_password, nullptr));
  ERR_clear_error();
  return key;
}

}  // namespace pyramid

#endif  // PYRAMID_SERVER_SECURITY_OPENSSL_H_
