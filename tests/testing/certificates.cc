#include "tests/testing/certificates.h"

#include <openssl/ec.h>
#include <openssl/rand.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "server/security/openssl.h"

namespace pyramid::testing {
namespace {

using FilePtr = std::unique_ptr<std::FILE, Freer<std::fclose>>;

void Need(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "certificates: %s\n", what);
  std::abort();
}

FilePtr Open(const std::filesystem::path& path, const char* mode) {
  FilePtr file(std::fopen(path.c_str(), mode));
  Need(file != nullptr, path.c_str());
  return file;
}

X509Ptr ReadCertificate(const std::filesystem::path& path) {
  return X509Ptr(PEM_read_X509(Open(path, "r").get(), nullptr, nullptr, nullptr));
}
KeyPtr ReadKey(const std::filesystem::path& path) {
  return KeyPtr(PEM_read_PrivateKey(Open(path, "r").get(), nullptr, nullptr, nullptr));
}

void AddExtension(X509& certificate, X509& issuer, int id, const char* value) {
  X509V3_CTX context;
  X509V3_set_ctx(&context, &issuer, &certificate, nullptr, nullptr, 0);
  X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, id, value);
  Need(extension != nullptr, value);
  X509_add_ext(&certificate, extension, -1);
  X509_EXTENSION_free(extension);
}

// A certificate over a fresh key; `issuer` null: signed by itself.
void Make(const CertificateFiles& files, const std::string& name, const std::string& alternatives,
          int days, const CertificateFiles* issuer) {
  const KeyPtr key(EVP_EC_gen("P-256"));
  const X509Ptr certificate(X509_new());
  X509_set_version(certificate.get(), 2);
  unsigned char serial[8];
  Need(RAND_bytes(serial, sizeof serial) == 1, "no random numbers");
  serial[0] = static_cast<unsigned char>((serial[0] & 0x7f) | 0x40);  // positive, no leading zero
  ASN1_INTEGER* number = X509_get_serialNumber(certificate.get());
  Need(ASN1_STRING_set(number, serial, sizeof serial) == 1, "serial");
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), -3600L * 24 * 365);
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), 3600L * 24 * days);
  X509_set_pubkey(certificate.get(), key.get());
  X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate.get()), "CN", MBSTRING_UTF8,
                             reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  if (issuer == nullptr) {
    X509_set_issuer_name(certificate.get(), X509_get_subject_name(certificate.get()));
    AddExtension(*certificate, *certificate, NID_basic_constraints, "critical,CA:TRUE");
    X509_sign(certificate.get(), key.get(), EVP_sha256());
  } else {
    const X509Ptr authority = ReadCertificate(issuer->certificate);
    const KeyPtr authority_key = ReadKey(issuer->private_key);
    X509_set_issuer_name(certificate.get(), X509_get_subject_name(authority.get()));
    if (!alternatives.empty()) {
      AddExtension(*certificate, *authority, NID_subject_alt_name, alternatives.c_str());
    }
    X509_sign(certificate.get(), authority_key.get(), EVP_sha256());
  }
  PEM_write_X509(Open(files.certificate, "w").get(), certificate.get());
  PEM_write_PrivateKey(Open(files.private_key, "w").get(), key.get(), nullptr, nullptr, 0, nullptr,
                       nullptr);
}

CertificateFiles FilesOf(const std::filesystem::path& folder, const std::string& name) {
  return {.certificate = folder / (name + ".pem"), .private_key = folder / (name + ".key")};
}

}  // namespace

CertificateAuthority::CertificateAuthority(const std::filesystem::path& folder,
                                           const std::string& name)
    : folder_(folder), files_(FilesOf(folder, name)) {
  Make(files_, name, "", 30, nullptr);
}

CertificateFiles CertificateAuthority::Issue(const std::string& file, const std::string& name,
                                             const std::string& alternative_names, int days) const {
  const CertificateFiles files = FilesOf(folder_, file);
  Make(files, name, alternative_names, days, &files_);
  return files;
}

}  // namespace pyramid::testing
