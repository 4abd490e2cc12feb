#include <gmock/gmock.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "tests/client/client_fixture.h"

namespace pyramid {
namespace {

using ::testing::AllOf;
using testing::CommandResult;
using ::testing::HasSubstr;

std::string Number(uint32_t value) {
  std::string bytes;
  for (int i = 0; i < 4; ++i) bytes += static_cast<char>(value >> (8 * i) & 0xff);
  return bytes;
}

// Picture i has label i % 10 and the text "LABEL/i"; the fake model answers with the label it
// reads, but is wrong for every tenth and has the truth in second place then.
class ValidateCommandTest : public testing::ClientFixture {
 protected:
  ValidateCommandTest() {
    Export(100, 10);
    server_.models = [](v1::ListModelsResponse& response) {
      *response.add_models() = testing::MakeModel("fashion", 1, 10, false);
      *response.add_models() = testing::MakeModel("fashion", 2, 10);
      response.set_max_pictures(16);
      return grpc::Status::OK;
    };
    server_.classify = [this](grpc::ServerContext&, const v1::ClassifyRequest& request,
                              v1::ClassifyResponse& response) { return Answer(request, response); };
  }

  // What the worker program will write.
  void Export(int count, int classes, const std::string& tail = "") {
    std::string bytes = absl::StrCat("{\"count\":", count, ",\"classes\":[");
    for (int i = 0; i < classes; ++i) absl::StrAppend(&bytes, i == 0 ? "" : ",", "\"c", i, "\"");
    bytes += "]}\n";
    for (int i = 0; i < count; ++i) {
      const std::string picture = absl::StrCat(i % classes, "/", i);
      bytes += Number(static_cast<uint32_t>(i % classes)) +
               Number(static_cast<uint32_t>(picture.size())) + picture;
    }
    Write("export.bin", bytes);
    environment_.worker =
        WriteScript("pyramid-worker",
                    absl::StrCat("#!/bin/sh\necho \"$@\" > arguments\ncat export.bin\n", tail));
  }

  grpc::Status Answer(const v1::ClassifyRequest& request, v1::ClassifyResponse& response) {
    absl::MutexLock lock(&mutex_);
    largest_ = std::max(largest_, request.pictures_size());
    versions_.insert(request.version());
    response.set_model(request.model());
    response.set_version(request.version());
    for (const v1::Picture& picture : request.pictures()) {
      seen_.insert(picture.encoded());
      const int label = picture.encoded()[0] - '0';
      const int index = std::stoi(picture.encoded().substr(2));
      v1::PictureResult& result = *response.add_results();
      if (failing_ == index) {
        result.set_code(3);
        result.set_message("truncated PNG");
        continue;
      }
      for (int rank = 0; rank < 5; ++rank) {
        v1::Prediction& prediction = *result.add_predictions();
        const int shift = index % 20 == 7 ? 10 - rank - 5 : (index % 10 == 3 ? 9 + rank : rank);
        prediction.set_index((label + shift) % 10);
        prediction.set_label(absl::StrCat("c", prediction.index()));
      }
    }
    return grpc::Status::OK;
  }

  absl::Mutex mutex_;
  int largest_ ABSL_GUARDED_BY(mutex_) = 0;
  int failing_ = -1;
  std::set<int64_t> versions_ ABSL_GUARDED_BY(mutex_);
  std::set<std::string> seen_ ABSL_GUARDED_BY(mutex_);
};

// Of 100 pictures, indices 3, 13, … (10) have the truth second; 7, 27, … (5) have shifts 5, 4, 3,
// 2, 1: the truth isn't among the five.
TEST_F(ValidateCommandTest, CountsTopOneAndTopFiveOfEveryPicture) {
  const CommandResult result = Pyramid({"validate", "--model", "fashion", "my data"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("top-1 0.8500\ntop-5 0.9500\nimages 100\nfailed 0\nimages/s "));
  EXPECT_THAT(result.err, HasSubstr("100/100 pictures"));
  absl::MutexLock lock(&mutex_);
  EXPECT_EQ(seen_.size(), 100u);
  EXPECT_EQ(versions_, std::set<int64_t>{2});
  EXPECT_EQ(largest_, 16);  // the server's limit
  std::ifstream arguments(folder_ / "arguments");
  std::string line;
  std::getline(arguments, line);
  EXPECT_EQ(line, "data export my data --split val --out -");
}

TEST_F(ValidateCommandTest, JsonHasEveryNumber) {
  const CommandResult result = Pyramid({"validate", "data", "--model", "fashion:1", "--split",
                                        "test", "--batch", "8", "--concurrency", "3", "--json"});
  EXPECT_EQ(result.code, 0) << result.err;
  const nlohmann::json json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json.at("model"), "fashion");
  EXPECT_EQ(json.at("version"), 1);
  EXPECT_EQ(json.at("split"), "test");
  EXPECT_EQ(json.at("images"), 100);
  EXPECT_EQ(json.at("failed"), 0);
  EXPECT_DOUBLE_EQ(json.at("top1").get<double>(), 0.85);
  EXPECT_DOUBLE_EQ(json.at("top5").get<double>(), 0.95);
  EXPECT_GT(json.at("images_per_second").get<double>(), 0);
  EXPECT_GT(json.at("seconds").get<double>(), 0);
  absl::MutexLock lock(&mutex_);
  EXPECT_EQ(largest_, 8);
}

TEST_F(ValidateCommandTest, TheOnlyModelInServiceIsTheDefault) {
  EXPECT_EQ(Pyramid({"validate", "data"}).code, 0);
  server_.models = [](v1::ListModelsResponse& response) {
    *response.add_models() = testing::MakeModel("a", 1, 10);
    *response.add_models() = testing::MakeModel("b", 1, 10);
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"validate", "data"});
  EXPECT_EQ(result.code, 2);
  EXPECT_THAT(result.err, HasSubstr("name one with --model"));
}

TEST_F(ValidateCommandTest, RefusedRequestsAreRepeatedAfterThePushback) {
  std::atomic<int> calls = 0;
  server_.classify = [&](grpc::ServerContext& context, const v1::ClassifyRequest& request,
                         v1::ClassifyResponse& response) {
    const int call = ++calls;
    if (call % 3 == 1) {
      context.AddTrailingMetadata("grpc-retry-pushback-ms", "20");
      return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "the queue is full");
    }
    if (call % 3 == 2) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "loading");
    return Answer(request, response);
  };
  const CommandResult result = Pyramid({"validate", "data", "--json"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(nlohmann::json::parse(result.out).at("images"), 100);
  EXPECT_DOUBLE_EQ(nlohmann::json::parse(result.out).at("top1").get<double>(), 0.85);
  EXPECT_EQ(calls, 3 * 7);
}

TEST_F(ValidateCommandTest, NegativePushbackEndsIt) {
  server_.classify = [](grpc::ServerContext& context, const v1::ClassifyRequest&,
                        v1::ClassifyResponse&) {
    context.AddTrailingMetadata("grpc-retry-pushback-ms", "-1");
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "quota used up");
  };
  const CommandResult result = Pyramid({"validate", "data"});
  EXPECT_EQ(result.code, 4);
  EXPECT_EQ(result.out, "");
  EXPECT_THAT(result.err, HasSubstr("pyramid: quota used up"));
}

TEST_F(ValidateCommandTest, OtherErrorsEndItAtOnce) {
  server_.classify = [](grpc::ServerContext&, const v1::ClassifyRequest&, v1::ClassifyResponse&) {
    return grpc::Status(grpc::StatusCode::INTERNAL, "the network failed");
  };
  Export(5000, 10);  // many more than are queued: the reader must not wait for ever
  const CommandResult result = Pyramid({"validate", "data"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("the network failed"));
}

TEST_F(ValidateCommandTest, PicturesThatFailAreCountedApartAndEndWithExitCode1) {
  failing_ = 50;
  const CommandResult result = Pyramid({"validate", "data"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.out, HasSubstr("images 99\nfailed 1\n"));
  EXPECT_THAT(result.err, HasSubstr("1 pictures failed, the first: truncated PNG"));
}

TEST_F(ValidateCommandTest, RequestsStayUnderTheServersMessageLimit) {
  server_.models = [](v1::ListModelsResponse& response) {
    *response.add_models() = testing::MakeModel("fashion", 2, 10);
    response.set_max_message_bytes((1 << 16) + 10);  // room for two or three pictures
    return grpc::Status::OK;
  };
  EXPECT_EQ(Pyramid({"validate", "data"}).code, 0);
  absl::MutexLock lock(&mutex_);
  EXPECT_EQ(largest_, 3);
  EXPECT_EQ(seen_.size(), 100u);
}

TEST_F(ValidateCommandTest, FewClassesHaveNoTopFive) {
  Export(10, 3);
  server_.models = [](v1::ListModelsResponse& response) {
    *response.add_models() = testing::MakeModel("m", 1, 3);
    return grpc::Status::OK;
  };
  const CommandResult result = Pyramid({"validate", "data", "--json"});
  EXPECT_TRUE(nlohmann::json::parse(result.out).at("top5").is_null());
  EXPECT_THAT(Pyramid({"validate", "data"}).out, ::testing::Not(HasSubstr("top-5")));
}

TEST_F(ValidateCommandTest, ClassesInAnotherOrderAreWarnedOf) {
  server_.classify = [this](grpc::ServerContext&, const v1::ClassifyRequest& request,
                            v1::ClassifyResponse& response) {
    const grpc::Status status = Answer(request, response);
    for (v1::PictureResult& result : *response.mutable_results()) {
      for (v1::Prediction& p : *result.mutable_predictions()) {
        p.set_label(absl::StrCat("other", p.index()));
      }
    }
    return status;
  };
  const CommandResult result = Pyramid({"validate", "data"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.err, HasSubstr("are the classes in the same order?"));
}

TEST_F(ValidateCommandTest, DataWithOtherClassesIsRefused) {
  Export(10, 3);
  const CommandResult result = Pyramid({"validate", "data"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("data has 3 classes, the model fashion has 10"));
}

TEST_F(ValidateCommandTest, UnknownModelAndVersionAreExitCode3) {
  EXPECT_EQ(Pyramid({"validate", "data", "--model", "nobody"}).code, 3);
  EXPECT_EQ(Pyramid({"validate", "data", "--model", "fashion:9"}).code, 3);
  server_.models = [](v1::ListModelsResponse&) { return grpc::Status::OK; };
  EXPECT_EQ(Pyramid({"validate", "data"}).code, 3);
}

TEST_F(ValidateCommandTest, MissingDataIsWrongUsage) {
  EXPECT_EQ(Pyramid({"validate", "--model", "fashion"}).code, 2);
}

TEST_F(ValidateCommandTest, WorkerThatFailsEndsIt) {
  environment_.worker =
      WriteScript("pyramid-worker", "#!/bin/sh\necho no such folder >&2\nexit 3\n");
  EXPECT_EQ(Pyramid({"validate", "data"}).code, 3);
  Export(100, 10, "exit 1\n");
  const CommandResult result = Pyramid({"validate", "data"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("couldn't export the pictures (exit code 1)"));
  environment_.worker.clear();
  EXPECT_THAT(Pyramid({"validate", "data"}).err, HasSubstr("pyramid-worker is neither"));
}

TEST_F(ValidateCommandTest, TruncatedExportIsNoResult) {
  std::filesystem::resize_file(folder_ / "export.bin",
                               std::filesystem::file_size(folder_ / "export.bin") - 3);
  const CommandResult result = Pyramid({"validate", "data"});
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(result.out, "");
  EXPECT_THAT(result.err, HasSubstr("the stream ends in picture 100 of 100"));
}

TEST_F(ValidateCommandTest, EmptySplitIsAFailure) {
  Export(0, 10);
  const CommandResult result = Pyramid({"validate", "data"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("no pictures in this split"));
}

TEST_F(ValidateCommandTest, UnreachableServerIsExitCode5) {
  server_.Stop();
  EXPECT_EQ(Pyramid({"validate", "data"}).code, 5);
}

}  // namespace
}  // namespace pyramid
