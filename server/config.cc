#include "server/config.h"

#include <yaml-cpp/yaml.h>

#include <set>
#include <type_traits>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/base/nearest.h"
#include "proto/base/status.h"

namespace pyramid {
namespace {

const std::set<std::string> kSections = {"serving", "promotion", "security", "connections",
                                         "training"};

// Calls visit(section, name, field) for every key; section "" is the top.
template <typename Visitor>
void VisitConfig(ServerConfig& c, Visitor&& visit) {
  visit("", "data", c.data);
  visit("", "host", c.host);
  visit("", "grpc_port", c.grpc_port);
  visit("", "http_port", c.http_port);
  visit("", "metrics_port", c.metrics_port);
  visit("", "reflection", c.reflection);
  visit("", "metrics_host", c.metrics_host);
  visit("", "access_log", c.access_log);
  visit("", "drain_delay", c.drain_delay);
  visit("", "log_json", c.log_json);
  visit("", "log_level", c.log_level);
  visit("", "drain_timeout", c.drain_timeout);
  visit("serving", "max_batch", c.serving.max_batch);
  visit("serving", "max_delay", c.serving.max_delay);
  visit("serving", "default_timeout", c.serving.default_timeout);
  visit("serving", "objective", c.serving.objective);
  visit("serving", "max_queue", c.serving.max_queue);
  visit("serving", "max_pictures", c.serving.max_pictures);
  visit("serving", "max_message_bytes", c.serving.max_message_bytes);
  visit("serving", "decode_threads", c.serving.decode_threads);
  visit("serving", "decode_queue", c.serving.decode_queue);
  visit("serving", "instances", c.serving.instances);
  visit("serving", "forward_threads", c.serving.forward_threads);
  visit("serving", "device", c.serving.device);
  visit("serving", "max_picture_bytes", c.serving.max_picture_bytes);
  visit("serving", "max_picture_pixels", c.serving.max_picture_pixels);
  visit("serving", "max_picture_side", c.serving.max_picture_side);
  visit("serving", "max_pixels_per_byte", c.serving.max_pixels_per_byte);
  visit("serving", "refuse_non_finite", c.serving.refuse_non_finite);
  visit("promotion", "min_top1", c.promotion.min_top1);
  visit("promotion", "max_latency", c.promotion.max_latency);
  visit("promotion", "latency_batch", c.promotion.latency_batch);
  visit("promotion", "min_agreement", c.promotion.min_agreement);
  visit("promotion", "require_self_test", c.promotion.require_self_test);
  visit("promotion", "load_threads", c.promotion.load_threads);
  visit("security", "keys", c.security.keys);
  visit("security", "tls_cert", c.security.tls_cert);
  visit("security", "tls_key", c.security.tls_key);
  visit("security", "tls_client_ca", c.security.tls_client_ca);
  visit("security", "tls_ca", c.security.tls_ca);
  visit("security", "worker_cert", c.security.worker_cert);
  visit("security", "worker_key", c.security.worker_key);
  visit("security", "allow_insecure", c.security.allow_insecure);
  visit("connections", "min_ping_interval", c.connections.min_ping_interval);
  visit("connections", "keepalive_time", c.connections.keepalive_time);
  visit("connections", "keepalive_timeout", c.connections.keepalive_timeout);
  visit("connections", "max_age", c.connections.max_age);
  visit("connections", "max_age_grace", c.connections.max_age_grace);
  visit("connections", "memory_bytes", c.connections.memory_bytes);
  visit("connections", "max_http", c.connections.max_http);
  visit("connections", "bdp_probe", c.connections.bdp_probe);
  visit("training", "cpu_workers", c.training.cpu_workers);
  visit("training", "cuda_devices", c.training.cuda_devices);
  visit("training", "npu_devices", c.training.npu_devices);
  visit("training", "lost_after", c.training.lost_after);
  visit("training", "reattach_window", c.training.reattach_window);
  visit("training", "stop_grace", c.training.stop_grace);
  visit("training", "start_timeout", c.training.start_timeout);
  visit("training", "worker_program", c.training.worker_program);
}

std::string FullName(absl::string_view section, absl::string_view name) {
  return section.empty() ? absl::StrCat("server.", name)
                         : absl::StrCat("server.", section, ".", name);
}

absl::Status Bad(absl::string_view key, absl::string_view text) {
  return absl::InvalidArgumentError(absl::StrCat(key, " ", text));
}

absl::Status Read(absl::string_view key, const std::string& text, bool& out) {
  if (!absl::SimpleAtob(text, &out))
    return Bad(key, absl::StrCat("is ", text, "; use true or false"));
  return absl::OkStatus();
}
absl::Status Read(absl::string_view key, const std::string& text, int& out) {
  if (!absl::SimpleAtoi(text, &out))
    return Bad(key, absl::StrCat("is ", text, "; use a whole number"));
  return absl::OkStatus();
}
absl::Status Read(absl::string_view key, const std::string& text, int64_t& out) {
  if (!absl::SimpleAtoi(text, &out))
    return Bad(key, absl::StrCat("is ", text, "; use a whole number"));
  return absl::OkStatus();
}
absl::Status Read(absl::string_view key, const std::string& text, double& out) {
  if (!absl::SimpleAtod(text, &out)) return Bad(key, absl::StrCat("is ", text, "; use a number"));
  return absl::OkStatus();
}
absl::Status Read(absl::string_view key, const std::string& text, absl::Duration& out) {
  if (!absl::ParseDuration(text, &out))
    return Bad(key, absl::StrCat("is ", text, "; use a duration like 250ms or 4s"));
  return absl::OkStatus();
}
absl::Status Read(absl::string_view, const std::string& text, std::string& out) {
  out = text;
  return absl::OkStatus();
}
absl::Status Read(absl::string_view, const std::string& text, std::filesystem::path& out) {
  out = text;
  return absl::OkStatus();
}

absl::Status SetKey(ServerConfig& config, const std::string& section, const std::string& key,
                    const YAML::Node& node) {
  absl::Status status;
  bool found = false;
  std::vector<std::string> known;
  VisitConfig(config, [&](absl::string_view in_section, absl::string_view name, auto& field) {
    if (in_section != section) return;
    known.emplace_back(name);
    if (name != key) return;
    found = true;
    status = node.IsScalar() ? Read(FullName(section, key), node.Scalar(), field)
                             : Bad(FullName(section, key), "is not a single value");
  });
  if (!found) {
    if (section.empty()) known.insert(known.end(), kSections.begin(), kSections.end());
    return absl::InvalidArgumentError(absl::StrCat(
        FullName(section, key), " is not a known key; did you mean ", Nearest(key, known), "?"));
  }
  return status;
}

template <typename T>
absl::Status InRange(absl::string_view key, T value, T low, T high) {
  if (value >= low && value <= high) return absl::OkStatus();
  if constexpr (std::is_same_v<T, absl::Duration>) {
    return Bad(key, absl::StrCat("is ", absl::FormatDuration(value), "; use ",
                                 absl::FormatDuration(low), "..", absl::FormatDuration(high)));
  } else {
    return Bad(key, absl::StrCat("is ", value, "; use ", low, "..", high));
  }
}

// Files that belong together.
absl::Status CheckSecurity(const ServerConfig& c) {
  const ServerConfig::Security& s = c.security;
  if (s.tls_cert.empty() != s.tls_key.empty()) {
    return Bad(
        "server.security",
        "has one of tls_cert and tls_key; a certificate and its private key belong together");
  }
  if (s.worker_cert.empty() != s.worker_key.empty()) {
    return Bad("server.security", "has one of worker_cert and worker_key; name both or neither");
  }
  for (const auto& [name, path] :
       {std::pair{"tls_client_ca", &s.tls_client_ca}, std::pair{"tls_ca", &s.tls_ca},
        std::pair{"worker_cert", &s.worker_cert}}) {
    if (!path->empty() && s.tls_cert.empty()) {
      return Bad(absl::StrCat("server.security.", name),
                 "needs TLS; set tls_cert and tls_key as well");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ServerConfig> ParseServerConfig(absl::string_view yaml) {
  ServerConfig config;
  try {
    const YAML::Node root = YAML::Load(std::string(yaml));
    if (!root.IsNull() && !root.IsMap())
      return absl::InvalidArgumentError("server: not a YAML map of keys and values");
    std::set<std::string> seen;
    for (const auto& entry : root) {
      if (!entry.first.IsScalar()) return absl::InvalidArgumentError("server: a key is not a word");
      const std::string key = entry.first.Scalar();
      if (!seen.insert(key).second) return Bad(FullName("", key), "stands twice");
      if (kSections.count(key) == 0) {
        RETURN_IF_ERROR(SetKey(config, "", key, entry.second));
        continue;
      }
      if (entry.second.IsNull()) continue;
      if (!entry.second.IsMap()) return Bad(FullName("", key), "is not a map of keys and values");
      for (const auto& inner : entry.second) {
        if (!inner.first.IsScalar()) return Bad(FullName("", key), "has a key that is not a word");
        if (!seen.insert(FullName(key, inner.first.Scalar())).second) {
          return Bad(FullName(key, inner.first.Scalar()), "stands twice");
        }
        RETURN_IF_ERROR(SetKey(config, key, inner.first.Scalar(), inner.second));
      }
    }
  } catch (const YAML::Exception& e) {
    return absl::InvalidArgumentError(absl::StrCat("server: not YAML: ", e.what()));
  }
  RETURN_IF_ERROR(CheckServerConfig(config));
  return config;
}

absl::Status CheckServerConfig(const ServerConfig& c) {
  if (c.data.empty()) return Bad("server.data", "is empty; use a folder");
  for (const auto& [key, host] :
       {std::pair{"server.host", &c.host}, std::pair{"server.metrics_host", &c.metrics_host}}) {
    if (host->empty()) return Bad(key, "is empty; use an address, 127.0.0.1 for this machine only");
  }
  for (const auto& [key, port] :
       {std::pair{"server.grpc_port", c.grpc_port}, std::pair{"server.http_port", c.http_port},
        std::pair{"server.metrics_port", c.metrics_port}}) {
    RETURN_IF_ERROR(InRange(key, port, 0, 65535));
  }
  const std::set<std::string> levels = {"debug", "info", "warning", "error"};
  if (levels.count(c.log_level) == 0) {
    return Bad("server.log_level",
               absl::StrCat("is ", c.log_level, "; use ", absl::StrJoin(levels, ", ")));
  }
  RETURN_IF_ERROR(
      InRange("server.drain_timeout", c.drain_timeout, absl::ZeroDuration(), absl::Hours(1)));
  RETURN_IF_ERROR(
      InRange("server.drain_delay", c.drain_delay, absl::ZeroDuration(), absl::Minutes(10)));
  RETURN_IF_ERROR(CheckSecurity(c));
  const ServerConfig::Connections& n = c.connections;
  RETURN_IF_ERROR(InRange("server.connections.min_ping_interval", n.min_ping_interval,
                          absl::Seconds(1), absl::Hours(24)));
  RETURN_IF_ERROR(InRange("server.connections.keepalive_time", n.keepalive_time, absl::Seconds(1),
                          absl::Hours(24)));
  RETURN_IF_ERROR(InRange("server.connections.keepalive_timeout", n.keepalive_timeout,
                          absl::Milliseconds(100), absl::Hours(1)));
  RETURN_IF_ERROR(
      InRange("server.connections.max_age", n.max_age, absl::ZeroDuration(), absl::Hours(24 * 24)));
  RETURN_IF_ERROR(InRange("server.connections.max_age_grace", n.max_age_grace, absl::ZeroDuration(),
                          absl::Hours(24)));
  RETURN_IF_ERROR(InRange("server.connections.max_http", n.max_http, 1, 4096));
  RETURN_IF_ERROR(InRange<int64_t>("server.connections.memory_bytes", n.memory_bytes,
                                   4 * c.serving.max_message_bytes, int64_t{1} << 40));
  const ServerConfig::Serving& s = c.serving;
  RETURN_IF_ERROR(InRange("server.serving.max_batch", s.max_batch, 1, 1024));
  RETURN_IF_ERROR(
      InRange("server.serving.max_delay", s.max_delay, absl::ZeroDuration(), absl::Seconds(10)));
  RETURN_IF_ERROR(InRange("server.serving.default_timeout", s.default_timeout, absl::ZeroDuration(),
                          absl::Hours(1)));
  RETURN_IF_ERROR(
      InRange("server.serving.objective", s.objective, absl::ZeroDuration(), absl::Hours(1)));
  RETURN_IF_ERROR(InRange("server.serving.max_queue", s.max_queue, 1, 1'000'000));
  RETURN_IF_ERROR(InRange("server.serving.max_pictures", s.max_pictures, 1, 4096));
  if (s.max_pictures > s.max_queue) {
    return Bad("server.serving.max_pictures",
               absl::StrCat("is ", s.max_pictures, "; use at most max_queue, ", s.max_queue,
                            ", or such a request could never be accepted"));
  }
  if (s.max_pictures > s.decode_queue) {
    return Bad("server.serving.max_pictures",
               absl::StrCat("is ", s.max_pictures, "; use at most decode_queue, ", s.decode_queue,
                            ", or such a request could never be accepted"));
  }
  RETURN_IF_ERROR(InRange<int64_t>("server.serving.max_message_bytes", s.max_message_bytes, 1 << 16,
                                   int64_t{1} << 30));
  RETURN_IF_ERROR(InRange("server.serving.decode_threads", s.decode_threads, 1, 256));
  RETURN_IF_ERROR(InRange("server.serving.decode_queue", s.decode_queue, 1, 1'000'000));
  RETURN_IF_ERROR(InRange("server.serving.instances", s.instances, 0, kMostInstances));
  RETURN_IF_ERROR(InRange("server.serving.forward_threads", s.forward_threads, 0, 1024));
  RETURN_IF_ERROR(InRange<int64_t>("server.serving.max_picture_bytes", s.max_picture_bytes, 1,
                                   int64_t{1} << 30));
  RETURN_IF_ERROR(InRange<int64_t>("server.serving.max_picture_pixels", s.max_picture_pixels, 1,
                                   int64_t{1} << 30));
  RETURN_IF_ERROR(InRange("server.serving.max_picture_side", s.max_picture_side, 1, 65535));
  RETURN_IF_ERROR(InRange<int64_t>("server.serving.max_pixels_per_byte", s.max_pixels_per_byte, 1,
                                   int64_t{1} << 30));
  const ServerConfig::Promotion& p = c.promotion;
  RETURN_IF_ERROR(InRange("server.promotion.min_top1", p.min_top1, 0.0, 1.0));
  RETURN_IF_ERROR(InRange("server.promotion.min_agreement", p.min_agreement, 0.0, 1.0));
  RETURN_IF_ERROR(
      InRange("server.promotion.max_latency", p.max_latency, absl::ZeroDuration(), absl::Hours(1)));
  RETURN_IF_ERROR(InRange("server.promotion.latency_batch", p.latency_batch, 1, s.max_batch));
  RETURN_IF_ERROR(InRange("server.promotion.load_threads", p.load_threads, 1, 1024));
  const ServerConfig::Training& t = c.training;
  RETURN_IF_ERROR(InRange("server.training.cpu_workers", t.cpu_workers, 0, 1024));
  RETURN_IF_ERROR(InRange("server.training.cuda_devices", t.cuda_devices, -1, 1024));
  RETURN_IF_ERROR(InRange("server.training.npu_devices", t.npu_devices, -1, 1024));
  RETURN_IF_ERROR(
      InRange("server.training.lost_after", t.lost_after, absl::Seconds(1), absl::Hours(24)));
  RETURN_IF_ERROR(InRange("server.training.reattach_window", t.reattach_window,
                          absl::Milliseconds(100), absl::Hours(1)));
  RETURN_IF_ERROR(
      InRange("server.training.stop_grace", t.stop_grace, absl::Milliseconds(100), absl::Hours(1)));
  return InRange("server.training.start_timeout", t.start_timeout, absl::Seconds(1),
                 absl::Hours(1));
}

}  // namespace pyramid
