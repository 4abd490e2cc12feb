#include "server/security/access.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "proto/base/file.h"
#include "proto/base/key.h"
#include "proto/base/status.h"
#include "server/serving/pushback.h"

namespace pyramid {
namespace {

constexpr Scopes kEverybody;
constexpr Scopes kInfer{Scope::kInfer};
constexpr Scopes kInferOrSubmit{Scope::kInfer, Scope::kSubmit};
constexpr Scopes kSubmit{Scope::kSubmit};
constexpr Scopes kWorker{Scope::kWorker};
constexpr Scopes kAdmin{Scope::kAdmin};

struct Rule {
  absl::string_view path;  // a trailing '*' stands for the rest
  Scopes needed;
};

// A method that isn't here needs admin: whoever adds one has to say who may call it.
constexpr Rule kRpcRules[] = {
    {"/pyramid.v1.ClassificationService/Classify", kInfer},
    {"/pyramid.v1.ClassificationService/ListModels", kInferOrSubmit},
    {"/pyramid.v1.TrainingService/SubmitJob", kSubmit},
    {"/pyramid.v1.TrainingService/GetJob", kSubmit},
    {"/pyramid.v1.TrainingService/ListJobs", kSubmit},
    {"/pyramid.v1.TrainingService/WatchJob", kSubmit},
    {"/pyramid.v1.TrainingService/CancelJob", kSubmit},
    {"/pyramid.v1.TrainingService/SaveCheckpoint", kSubmit},
    {"/pyramid.v1.TrainingService/PromoteCheckpoint", kAdmin},
    {"/pyramid.v1.ModelService/*", kAdmin},
    {"/pyramid.v1.WorkerService/*", kWorker},
    {"/inference.GRPCInferenceService/ServerLive", kEverybody},
    {"/inference.GRPCInferenceService/ServerReady", kEverybody},
    {"/inference.GRPCInferenceService/ModelReady", kEverybody},
    {"/inference.GRPCInferenceService/ServerMetadata", kInfer},
    {"/inference.GRPCInferenceService/ModelMetadata", kInfer},
    {"/inference.GRPCInferenceService/ModelConfig", kInfer},
    {"/inference.GRPCInferenceService/ModelStatistics", kInfer},
    {"/inference.GRPCInferenceService/ModelInfer", kInfer},
    {"/inference.GRPCInferenceService/ModelStreamInfer", kInfer},
    {"/inference.GRPCInferenceService/RepositoryIndex", kInfer},
    {"/inference.GRPCInferenceService/*", kAdmin},  // load and unload, settings
    {"/grpc.health.v1.Health/*", kEverybody},
    {"/grpc.reflection.v1alpha.ServerReflection/*", kEverybody},
    {"/grpc.reflection.v1.ServerReflection/*", kEverybody},
};

const Rule* FindRule(absl::string_view path) {
  for (const Rule& rule : kRpcRules) {
    const bool prefix = absl::EndsWith(rule.path, "*");
    const absl::string_view text = prefix ? rule.path.substr(0, rule.path.size() - 1) : rule.path;
    if (prefix ? absl::StartsWith(path, text) : path == text) return &rule;
  }
  return nullptr;
}

// Models may be called "ready": only a path's form tells. It is decoded, as RestV2 has it.
//   "/v2/models/M/ready", "/v2/models/M/versions/V/ready"
bool IsModelReady(absl::string_view path) {
  const std::vector<absl::string_view> parts = absl::StrSplit(path, '/');  // the first is empty
  if (parts.size() != 5 && parts.size() != 7) return false;
  if (!parts[0].empty() || parts[1] != "v2" || parts[2] != "models" || parts[3].empty()) {
    return false;
  }
  if (parts.size() == 7 && (parts[4] != "versions" || parts[5].empty())) return false;
  return parts.back() == "ready";
}

bool IsHttpHealth(absl::string_view path) {
  return path == "/healthz" || path == "/readyz" || path == "/v2/health/live" ||
         path == "/v2/health/ready" || IsModelReady(path);
}

// The key itself; empty: none was sent.
absl::string_view KeyIn(const Credentials& credentials) {
  absl::string_view text = absl::StripAsciiWhitespace(credentials.authorization);
  if (text.empty()) return absl::StripAsciiWhitespace(credentials.api_key);
  constexpr absl::string_view kBearer = "bearer ";
  if (text.size() > kBearer.size() &&
      absl::EqualsIgnoreCase(text.substr(0, kBearer.size()), kBearer)) {
    text.remove_prefix(kBearer.size());
  }
  return absl::StripAsciiWhitespace(text);
}

constexpr absl::string_view kTokenPrefix = "pyw.";

struct TokenParts {
  std::string job_id;
  int64_t epoch = 0;
  absl::string_view mac;
};

// "pyw.<epoch>.<job id in base64>.<HMAC>".
bool ParseToken(absl::string_view token, TokenParts& parts) {
  if (!absl::ConsumePrefix(&token, kTokenPrefix)) return false;
  const std::vector<absl::string_view> fields = absl::StrSplit(token, '.');
  if (fields.size() != 3) return false;
  parts.mac = fields[2];
  return absl::SimpleAtoi(fields[0], &parts.epoch) &&
         absl::WebSafeBase64Unescape(fields[1], &parts.job_id);
}

std::string Signed(absl::string_view secret, absl::string_view job_id, int64_t epoch) {
  return HmacHex(secret, absl::StrCat("worker ", epoch, " ", job_id));
}

// Reads the file, or makes it for us alone. Whoever has the data folder has the jobs too.
absl::StatusOr<std::string> ReadOrMakeSecret(const std::filesystem::path& path) {
  absl::StatusOr<std::string> old = ReadFile(path, 4096);
  if (old.ok() && old->size() >= 64) return old;
  if (!old.ok() && !absl::IsNotFound(old.status())) return old.status();
  ASSIGN_OR_RETURN(const std::string random, RandomBytes(32));
  const std::string text = absl::BytesToHexString(random);
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (file < 0) return ErrnoStatus(errno, "can't write", path);
  const ssize_t wrote = write(file, text.data(), text.size());
  const int error = errno;
  const bool synced = fsync(file) == 0;
  close(file);
  if (wrote != static_cast<ssize_t>(text.size()) || !synced) {
    return ErrnoStatus(wrote < 0 ? error : ENOSPC, "can't write", path);
  }
  return text;
}

}  // namespace

Scopes NeededForRpc(absl::string_view path) {
  const Rule* rule = FindRule(path);
  return rule == nullptr ? kAdmin : rule->needed;
}

bool IsInRpcTable(absl::string_view path) { return FindRule(path) != nullptr; }

Scopes NeededForHttp(absl::string_view method, absl::string_view path) {
  const bool reads = method == "GET" || method == "HEAD";
  if (reads && IsHttpHealth(path)) return kEverybody;
  if (absl::StartsWith(path, "/v2/repository/models/")) return kAdmin;  // load, unload
  const bool v2 = path == "/v2" || absl::StartsWith(path, "/v2/");
  if (v2 && reads) return kInfer;
  if (method == "POST" && path == "/v2/repository/index") return kInfer;
  if (method == "POST" && absl::StartsWith(path, "/v2/models/") && absl::EndsWith(path, "/infer")) {
    return kInfer;
  }
  return kAdmin;
}

absl::StatusOr<std::unique_ptr<Access>> Access::Create(const Options& options, Metrics& metrics,
                                                       Clock& clock) {
  std::unique_ptr<Access> access(new Access(metrics, clock));
  if (options.keys.empty()) return access;
  ASSIGN_OR_RETURN(access->ring_, KeyRing::Open(options.keys, clock));
  ASSIGN_OR_RETURN(access->secret_, ReadOrMakeSecret(options.worker_secret));
  return access;
}

std::shared_ptr<const Caller> Access::WorkerOf(absl::string_view token) const {
  TokenParts parts;
  if (!ParseToken(token, parts)) return nullptr;
  if (!SameSecret(Signed(secret_, parts.job_id, parts.epoch), parts.mac)) return nullptr;
  return std::make_shared<const Caller>(absl::StrCat("worker of ", parts.job_id), kWorker, 0,
                                        absl::InfiniteFuture());
}

absl::StatusOr<std::shared_ptr<const Caller>> Access::Identify(
    const Credentials& credentials) const {
  if (ring_ == nullptr) return std::shared_ptr<const Caller>();
  const absl::string_view key = KeyIn(credentials);
  if (key.empty()) {
    return absl::UnauthenticatedError(
        "a key is needed; send \"authorization: Bearer KEY\" or \"x-api-key: KEY\"");
  }
  std::shared_ptr<const Caller> caller =
      absl::StartsWith(key, kTokenPrefix) ? WorkerOf(key) : ring_->Find(key);
  if (caller == nullptr) return absl::UnauthenticatedError("the key isn't known here");
  if (caller->expires() <= clock_.Now()) {
    return absl::UnauthenticatedError(
        absl::StrCat("the key ", caller->name(), " has expired; ask for a new one"));
  }
  return caller;
}

absl::Status Access::Admit(const Credentials& credentials, Scopes needed,
                           absl::string_view what) const {
  if (ring_ == nullptr || needed.empty()) return absl::OkStatus();
  const absl::StatusOr<std::shared_ptr<const Caller>> caller = Identify(credentials);
  if (!caller.ok()) {
    metrics_.CountRefusedCall(Metrics::Refusal::kAuth);
    return caller.status();
  }
  const Scopes has = (*caller)->scopes();
  if (has.Has(Scope::kAdmin) || has.Meets(needed)) return absl::OkStatus();
  metrics_.CountRefusedCall(Metrics::Refusal::kScope);
  return absl::PermissionDeniedError(absl::StrCat(
      "the key ", (*caller)->name(), " may ", has.Text(), "; ", what, " needs ", needed.Text()));
}

absl::Status Access::Charge(const Credentials& credentials, int images) const {
  const absl::StatusOr<std::shared_ptr<const Caller>> caller = Identify(credentials);
  if (!caller.ok()) {  // the key was good when the call came
    metrics_.CountRefusedCall(Metrics::Refusal::kAuth);
    return caller.status();
  }
  if (*caller == nullptr) return absl::OkStatus();
  const absl::Duration wait = (*caller)->Charge(images, clock_.Now());
  if (wait <= absl::ZeroDuration()) return absl::OkStatus();
  return WithPushback(absl::ResourceExhaustedError(absl::StrCat(
                          "the key ", (*caller)->name(), " may send ",
                          (*caller)->images_per_second(), " images per second; come back in ",
                          absl::FormatDuration(absl::Ceil(wait, absl::Milliseconds(1))))),
                      absl::Ceil(wait, absl::Milliseconds(1)));
}

std::string Access::WorkerToken(absl::string_view job_id, int64_t epoch) const {
  if (ring_ == nullptr) return "";
  std::string job;
  absl::WebSafeBase64Escape(job_id, &job);
  return absl::StrCat(kTokenPrefix, epoch, ".", job, ".", Signed(secret_, job_id, epoch));
}

absl::Status Access::CheckWorker(const Credentials& credentials, absl::string_view job_id,
                                 int64_t epoch) const {
  if (ring_ == nullptr) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::shared_ptr<const Caller> caller, Identify(credentials));
  const absl::string_view key = KeyIn(credentials);
  if (!absl::StartsWith(key, kTokenPrefix)) {  // a key of scope worker is good for every attempt
    if (caller->scopes().Has(Scope::kWorker) || caller->scopes().Has(Scope::kAdmin)) {
      return absl::OkStatus();
    }
    metrics_.CountRefusedCall(Metrics::Refusal::kScope);
    return absl::PermissionDeniedError(absl::StrCat("the key ", caller->name(), " may ",
                                                    caller->scopes().Text(),
                                                    "; reporting as a worker needs worker"));
  }
  if (SameSecret(key, WorkerToken(job_id, epoch))) return absl::OkStatus();
  metrics_.CountRefusedCall(Metrics::Refusal::kScope);
  return absl::PermissionDeniedError(
      absl::StrCat("the token is another attempt's, not that of attempt ", epoch, " of ", job_id));
}

}  // namespace pyramid
