// A certificate authority of a test's own.
#ifndef PYRAMID_TESTS_TESTING_CERTIFICATES_H_
#define PYRAMID_TESTS_TESTING_CERTIFICATES_H_

#include <filesystem>
#include <string>
#include <vector>

namespace pyramid::testing {

struct CertificateFiles {
  std::filesystem::path certificate;
  std::filesystem::path private_key;
};

class CertificateAuthority {
 public:
  // Writes <name>.pem and <name>.key into `folder`.
  CertificateAuthority(const std::filesystem::path& folder, const std::string& name);

  const std::filesystem::path& certificate() const { return files_.certificate; }

  // A certificate for `name` (common name) with alternative names like
  // "DNS:localhost,IP:127.0.0.1", written as <file>.pem and <file>.key. `days` negative: it has
  // expired.
  CertificateFiles Issue(const std::string& file, const std::string& name,
                         const std::string& alternative_names, int days = 30) const;

 private:
  std::filesystem::path folder_;
  CertificateFiles files_;
};

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_CERTIFICATES_H_
