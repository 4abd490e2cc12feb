#include "server/security/tls_files.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "absl/time/clock.h"
#include "proto/base/file.h"
#include "tests/testing/certificates.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_folder.h"

namespace pyramid {
namespace {

using testing::CertificateFiles;
using ::testing::HasSubstr;
using testing::StatusIs;

class TlsFilesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    first_ = authority_.Issue("first", "one", "DNS:pyramid.test,IP:127.0.0.1");
    second_ = authority_.Issue("second", "two", "DNS:*.example.org");
    Install(first_.certificate, paths_.certificate);
    Install(first_.private_key, paths_.private_key);
  }
  static void Install(const std::filesystem::path& from, const std::filesystem::path& to) {
    const absl::StatusOr<std::string> text = ReadFile(from);
    ASSERT_OK(text);
    ASSERT_OK(WriteFileAtomically(to, *text));
  }

  testing::TempFolder folder_;
  const testing::CertificateAuthority authority_{folder_.path(), "ca"};
  CertificateFiles first_;
  CertificateFiles second_;
  TlsFiles::Paths paths_{.certificate = folder_ / "live.pem", .private_key = folder_ / "live.key"};
};

TEST_F(TlsFilesTest, ReadsTheCertificateAndItsName) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<TlsFiles> files, TlsFiles::Open(paths_));
  const std::shared_ptr<const TlsPem> pem = files->Current();
  EXPECT_EQ(pem->name, "pyramid.test");
  EXPECT_EQ(pem->certificate, *ReadFile(first_.certificate));
  EXPECT_EQ(pem->client_ca, "");
  EXPECT_GT(pem->expires, absl::Now() + absl::Hours(24 * 29));
  EXPECT_LT(pem->expires, absl::Now() + absl::Hours(24 * 31));
  EXPECT_EQ(files->Current()->version, pem->version) << "nothing has changed";
}

TEST_F(TlsFilesTest, ANewPairCountsAtOnce) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<TlsFiles> files, TlsFiles::Open(paths_));
  const int64_t version = files->Current()->version;
  Install(second_.private_key, paths_.private_key);
  EXPECT_EQ(files->Current()->version, version) << "half of a pair: the old one stays";
  EXPECT_EQ(files->Current()->certificate, *ReadFile(first_.certificate));
  Install(second_.certificate, paths_.certificate);
  EXPECT_EQ(files->Current()->version, version + 1);
  EXPECT_EQ(files->Current()->certificate, *ReadFile(second_.certificate));
  EXPECT_EQ(files->Current()->name, "pyramid.example.org") << "a name that the wildcard covers";
}

TEST_F(TlsFilesTest, ABadChangeKeepsTheOldPair) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<TlsFiles> files, TlsFiles::Open(paths_));
  const int64_t version = files->Current()->version;
  ASSERT_OK(WriteFileAtomically(paths_.certificate, "garbage"));
  EXPECT_EQ(files->Current()->version, version);
  std::filesystem::remove(paths_.certificate);
  EXPECT_EQ(files->Current()->version, version);
  Install(first_.certificate, paths_.certificate);
  EXPECT_EQ(files->Current()->version, version) << "the same text again is no change";
}

TEST_F(TlsFilesTest, WhatCantBeReadIsAnErrorThatNamesTheFile) {
  std::filesystem::remove(paths_.private_key);
  EXPECT_THAT(TlsFiles::Open(paths_), StatusIs(absl::StatusCode::kNotFound, HasSubstr("live.key")));
  Install(second_.private_key, paths_.private_key);
  EXPECT_THAT(TlsFiles::Open(paths_),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("live.key isn't the private key of the certificate in")));
  ASSERT_OK(WriteFileAtomically(paths_.private_key, "text"));
  EXPECT_THAT(TlsFiles::Open(paths_), StatusIs(absl::StatusCode::kInvalidArgument,
                                               HasSubstr("live.key holds no private key")));
  ASSERT_OK(WriteFileAtomically(paths_.certificate, ""));
  EXPECT_THAT(TlsFiles::Open(paths_), StatusIs(absl::StatusCode::kInvalidArgument,
                                               HasSubstr("live.pem holds no certificate")));
}

TEST_F(TlsFilesTest, AuthoritiesOfClientsAreCheckedToo) {
  paths_.client_ca = folder_ / "clients.pem";
  EXPECT_THAT(TlsFiles::Open(paths_),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("clients.pem")));
  ASSERT_OK(WriteFileAtomically(paths_.client_ca, "text"));
  EXPECT_THAT(TlsFiles::Open(paths_), StatusIs(absl::StatusCode::kInvalidArgument,
                                               HasSubstr("clients.pem holds no certificate")));
  Install(authority_.certificate(), paths_.client_ca);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<TlsFiles> files, TlsFiles::Open(paths_));
  EXPECT_EQ(files->Current()->client_ca, *ReadFile(authority_.certificate()));
}

TEST_F(TlsFilesTest, AnExpiredCertificateIsTaken) {
  // A server that doesn't start can't be given a new one.
  const CertificateFiles old = authority_.Issue("old", "old", "DNS:pyramid.test", -1);
  EXPECT_OK(TlsFiles::Open({.certificate = old.certificate, .private_key = old.private_key}));
}

}  // namespace
}  // namespace pyramid
