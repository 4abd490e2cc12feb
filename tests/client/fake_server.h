// A server whose answers are the test's: all services on a free loopback port, each call a
// function that may be replaced.
#ifndef PYRAMID_TESTS_CLIENT_FAKE_SERVER_H_
#define PYRAMID_TESTS_CLIENT_FAKE_SERVER_H_

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "proto/classification.grpc.pb.h"
#include "proto/lifecycle.grpc.pb.h"
#include "proto/training.grpc.pb.h"

namespace pyramid::testing {

class FakeServer final : public v1::TrainingService::Service,
                         public v1::ClassificationService::Service,
                         public v1::ModelService::Service {
 public:
  FakeServer();
  ~FakeServer() override;

  // "127.0.0.1:PORT".
  const std::string& address() const { return address_; }
  // Ends all calls and stops listening.
  void Stop();

  // Set before the call that uses them. Unset: UNIMPLEMENTED.
  std::function<grpc::Status(const v1::SubmitJobRequest&, v1::SubmitJobResponse&)> submit;
  std::function<grpc::Status(const v1::GetJobRequest&, v1::Job&)> get;
  std::function<grpc::Status(const v1::ListJobsRequest&, v1::ListJobsResponse&)> list;
  std::function<grpc::Status(const v1::WatchJobRequest&, grpc::ServerWriter<v1::JobEvent>&)> watch;
  std::function<grpc::Status(const v1::CancelJobRequest&, v1::Job&)> cancel;
  std::function<grpc::Status(const v1::SaveCheckpointRequest&, v1::Job&)> save;
  std::function<grpc::Status(const v1::PromoteCheckpointRequest&, v1::PromoteCheckpointResponse&)>
      promote;
  std::function<grpc::Status(grpc::ServerContext&, const v1::ClassifyRequest&,
                             v1::ClassifyResponse&)>
      classify;
  std::function<grpc::Status(v1::ListModelsResponse&)> models;
  std::function<grpc::Status(const v1::SetAliasRequest&, v1::ModelState&)> set_alias;
  std::function<grpc::Status(const v1::RemoveAliasRequest&, v1::ModelState&)> remove_alias;
  std::function<grpc::Status(const v1::SetTrafficRequest&, v1::ModelState&)> set_traffic;
  std::function<grpc::Status(const v1::RollbackRequest&, v1::ModelState&)> rollback;
  std::function<grpc::Status(const v1::LoadModelRequest&, v1::ModelState&)> load;
  std::function<grpc::Status(const v1::UnloadModelRequest&, v1::ModelState&)> unload;
  std::function<grpc::Status(const v1::ListModelEventsRequest&, v1::ListModelEventsResponse&)>
      events;

 private:
  template <typename Function, typename... Arguments>
  grpc::Status Answer(const Function& function, Arguments&&... arguments) {
    if (!function) return {grpc::StatusCode::UNIMPLEMENTED, "the test gave no answer"};
    return function(std::forward<Arguments>(arguments)...);
  }

  grpc::Status SubmitJob(grpc::ServerContext*, const v1::SubmitJobRequest* request,
                         v1::SubmitJobResponse* response) override {
    return Answer(submit, *request, *response);
  }
  grpc::Status GetJob(grpc::ServerContext*, const v1::GetJobRequest* request,
                      v1::Job* response) override {
    return Answer(get, *request, *response);
  }
  grpc::Status ListJobs(grpc::ServerContext*, const v1::ListJobsRequest* request,
                        v1::ListJobsResponse* response) override {
    return Answer(list, *request, *response);
  }
  grpc::Status WatchJob(grpc::ServerContext*, const v1::WatchJobRequest* request,
                        grpc::ServerWriter<v1::JobEvent>* writer) override {
    return Answer(watch, *request, *writer);
  }
  grpc::Status CancelJob(grpc::ServerContext*, const v1::CancelJobRequest* request,
                         v1::Job* response) override {
    return Answer(cancel, *request, *response);
  }
  grpc::Status SaveCheckpoint(grpc::ServerContext*, const v1::SaveCheckpointRequest* request,
                              v1::Job* response) override {
    return Answer(save, *request, *response);
  }
  grpc::Status PromoteCheckpoint(grpc::ServerContext*, const v1::PromoteCheckpointRequest* request,
                                 v1::PromoteCheckpointResponse* response) override {
    return Answer(promote, *request, *response);
  }
  grpc::Status Classify(grpc::ServerContext* context, const v1::ClassifyRequest* request,
                        v1::ClassifyResponse* response) override {
    return Answer(classify, *context, *request, *response);
  }
  grpc::Status ListModels(grpc::ServerContext*, const v1::ListModelsRequest*,
                          v1::ListModelsResponse* response) override {
    return Answer(models, *response);
  }
  grpc::Status SetAlias(grpc::ServerContext*, const v1::SetAliasRequest* request,
                        v1::ModelState* response) override {
    return Answer(set_alias, *request, *response);
  }
  grpc::Status RemoveAlias(grpc::ServerContext*, const v1::RemoveAliasRequest* request,
                           v1::ModelState* response) override {
    return Answer(remove_alias, *request, *response);
  }
  grpc::Status SetTraffic(grpc::ServerContext*, const v1::SetTrafficRequest* request,
                          v1::ModelState* response) override {
    return Answer(set_traffic, *request, *response);
  }
  grpc::Status Rollback(grpc::ServerContext*, const v1::RollbackRequest* request,
                        v1::ModelState* response) override {
    return Answer(rollback, *request, *response);
  }
  grpc::Status LoadModel(grpc::ServerContext*, const v1::LoadModelRequest* request,
                         v1::ModelState* response) override {
    return Answer(load, *request, *response);
  }
  grpc::Status UnloadModel(grpc::ServerContext*, const v1::UnloadModelRequest* request,
                           v1::ModelState* response) override {
    return Answer(unload, *request, *response);
  }
  grpc::Status ListModelEvents(grpc::ServerContext*, const v1::ListModelEventsRequest* request,
                               v1::ListModelEventsResponse* response) override {
    return Answer(events, *request, *response);
  }

  std::string address_;
  std::unique_ptr<grpc::Server> server_;
};

// A job as the server would tell it.
v1::Job MakeJob(const std::string& id, v1::JobState state);
v1::JobEvent JobEventOf(int64_t number, const v1::Job& job);
v1::JobEvent ProgressEventOf(int64_t number, int64_t step, int64_t steps);

// A model in service.
v1::ModelVersion MakeModel(const std::string& name, int64_t version, int classes,
                           bool serving = true);

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_CLIENT_FAKE_SERVER_H_
