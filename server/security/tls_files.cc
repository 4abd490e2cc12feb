#include "server/security/tls_files.h"

#include <openssl/err.h>
#include <sys/stat.h>

#include <ctime>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "server/security/openssl.h"

namespace pyramid {
namespace {

constexpr int64_t kMostBytes = 1 << 20;

absl::Time ExpiryOf(X509* certificate) {
  std::tm parts{};
  if (ASN1_TIME_to_tm(X509_get0_notAfter(certificate), &parts) != 1) return absl::InfiniteFuture();
  return absl::FromTM(parts, absl::UTCTimeZone());
}

std::string TextOf(const ASN1_STRING* string) {
  return {reinterpret_cast<const char*>(ASN1_STRING_get0_data(string)),
          static_cast<size_t>(ASN1_STRING_length(string))};
}

// The first DNS name or address that a client may ask for: a wildcard can't be asked for.
std::string NameOf(X509* certificate) {
  auto* names = static_cast<GENERAL_NAMES*>(
      X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr));
  std::string found;
  for (int i = 0; names != nullptr && found.empty() && i < sk_GENERAL_NAME_num(names); ++i) {
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(names, i);
    if (name->type == GEN_DNS) found = TextOf(name->d.dNSName);
    if (absl::StartsWith(found, "*.")) found = absl::StrCat("pyramid", found.substr(1));
    if (name->type == GEN_IPADD && ASN1_STRING_length(name->d.iPAddress) == 4) {
      const unsigned char* bytes = ASN1_STRING_get0_data(name->d.iPAddress);
      found = absl::StrCat(bytes[0], ".", bytes[1], ".", bytes[2], ".", bytes[3]);
    }
  }
  GENERAL_NAMES_free(names);
  return found;
}

absl::Status NotPem(const std::filesystem::path& path, absl::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat(path.string(), " holds no ", what, " in PEM form"));
}

}  // namespace

absl::StatusOr<TlsPem> ReadTls(const TlsFiles::Paths& paths) {
  TlsPem pem;
  ASSIGN_OR_RETURN(pem.certificate, ReadFile(paths.certificate, kMostBytes));
  ASSIGN_OR_RETURN(pem.private_key, ReadFile(paths.private_key, kMostBytes));
  const std::vector<X509Ptr> chain = CertificatesOf(pem.certificate);
  if (chain.empty()) return NotPem(paths.certificate, "certificate");
  const KeyPtr key = PrivateKeyOf(pem.private_key);
  if (key == nullptr) return NotPem(paths.private_key, "private key without a password");
  const bool belongs = X509_check_private_key(chain.front().get(), key.get()) == 1;
  ERR_clear_error();
  if (!belongs) {
    return absl::InvalidArgumentError(absl::StrCat(paths.private_key.string(),
                                                   " isn't the private key of the certificate in ",
                                                   paths.certificate.string()));
  }
  if (!paths.client_ca.empty()) {
    ASSIGN_OR_RETURN(pem.client_ca, ReadFile(paths.client_ca, kMostBytes));
    if (CertificatesOf(pem.client_ca).empty()) return NotPem(paths.client_ca, "certificate");
  }
  pem.name = NameOf(chain.front().get());
  pem.expires = ExpiryOf(chain.front().get());
  return pem;
}

absl::StatusOr<std::unique_ptr<TlsFiles>> TlsFiles::Open(const Paths& paths) {
  std::unique_ptr<TlsFiles> files(new TlsFiles(paths));
  std::string stamp = files->Stamp();
  ASSIGN_OR_RETURN(TlsPem pem, ReadTls(paths));
  pem.version = 1;
  if (pem.expires < absl::Now()) {
    log::Warning("certificate_expired", {{"path", paths.certificate.string()},
                                         {"expired", absl::FormatTime(pem.expires)}});
  }
  absl::MutexLock lock(&files->mutex_);
  files->stamp_ = std::move(stamp);
  files->current_ = std::make_shared<const TlsPem>(std::move(pem));
  return files;
}

std::string TlsFiles::Stamp() const {
  std::string stamp;
  for (const std::filesystem::path* path :
       {&paths_.certificate, &paths_.private_key, &paths_.client_ca}) {
    struct stat found {};
    if (path->empty() || stat(path->c_str(), &found) != 0) {
      stamp += "-;";
    } else {
      absl::StrAppend(&stamp, found.st_dev, ",", found.st_ino, ",", found.st_size, ",",
                      found.st_mtim.tv_sec, ".", found.st_mtim.tv_nsec, ";");
    }
  }
  return stamp;
}

std::shared_ptr<const TlsPem> TlsFiles::Current() {
  absl::MutexLock lock(&mutex_);
  std::string stamp = Stamp();
  if (stamp == stamp_) return current_;
  stamp_ = std::move(stamp);
  absl::StatusOr<TlsPem> fresh = ReadTls(paths_);
  if (!fresh.ok()) {
    log::Error("certificate_not_reloaded", {{"error", fresh.status().message()},
                                            {"old_expires", absl::FormatTime(current_->expires)}});
    return current_;
  }
  if (fresh->certificate == current_->certificate && fresh->private_key == current_->private_key &&
      fresh->client_ca == current_->client_ca) {
    return current_;
  }
  fresh->version = current_->version + 1;
  log::Info("certificate_reloaded",
            {{"path", paths_.certificate.string()}, {"expires", absl::FormatTime(fresh->expires)}});
  current_ = std::make_shared<const TlsPem>(*std::move(fresh));
  return current_;
}

}  // namespace pyramid
