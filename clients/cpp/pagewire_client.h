// A client of pagewire.v1.InferenceService made from its protocol alone: gRPC C++ and generated code.
//
//   pagewire::Client client("127.0.0.1:50051");
//   client.stream(request, [](const pagewire::v1::GenerateResponse& response) { std::cout << response.text(); });
//
// generate and attach are the calls as they are. stream adds what gRPC does not do: it goes on after a broken
// connection, without a gap and without a repeat. Every failed call throws pagewire::ServiceError.
#pragma once

#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/grpcpp.h>
#include <pagewire/v1/inference.grpc.pb.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace pagewire {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// One wrong field of a request.
struct Violation {
  std::string field;
  std::string description;
};

// A call's status with its details.
struct ServiceError : std::runtime_error {
  // Reads the details: error_details() holds grpc-status-details-bin, a serialized google.rpc.Status.
  explicit ServiceError(const grpc::Status& status)
      : std::runtime_error(status.error_message()), code(status.error_code()) {
    google::rpc::Status rich;
    if (!rich.ParseFromString(status.error_details())) return;
    for (const auto& detail : rich.details()) {
      google::rpc::ErrorInfo info;
      google::rpc::BadRequest bad;
      google::rpc::RetryInfo retry;
      if (detail.UnpackTo(&info)) {
        reason = info.reason();
      } else if (detail.UnpackTo(&bad)) {
        for (const auto& entry : bad.field_violations()) violations.push_back({entry.field(), entry.description()});
      } else if (detail.UnpackTo(&retry)) {
        retry_after = milliseconds(retry.retry_delay().seconds() * 1000 + retry.retry_delay().nanos() / 1'000'000);
      }
    }
  }

  grpc::StatusCode code;
  std::string reason;                       // ErrorInfo.reason, one of docs/errors.md; empty where no server answered
  std::vector<Violation> violations;        // from BadRequest
  std::optional<milliseconds> retry_after;  // from RetryInfo; none: a retry does not help
};

using Positions = std::map<uint32_t, uint32_t>;  // first token wanted, by index

// What has arrived of a request's sequences.
class Progress {
 public:
  explicit Progress(const v1::GenerateRequest& request) : sequences_(std::max(1u, request.sampling().n())) {}

  // Whether every sequence has finished.
  bool done() const { return finished_.size() == sequences_; }

  // What Attach needs to go on.
  const Positions& positions() const { return positions_; }

  // Takes a response. False: it only repeats the end of a sequence that had finished before a break.
  bool accept(const v1::GenerateResponse& response) {
    if (finished_.count(response.index())) return false;
    uint32_t& expected = positions_[response.index()];
    if (response.first_token() != expected) {
      throw std::logic_error("sequence " + std::to_string(response.index()) + ": token " +
                             std::to_string(response.first_token()) + " instead of " + std::to_string(expected));
    }
    expected += response.token_ids_size();
    if (response.has_finish()) finished_.insert(response.index());
    return true;
  }

 private:
  Positions positions_;
  std::set<uint32_t> finished_;
  size_t sequences_;
};

// The responses of one Generate or Attach call. Destroying it before its end drops the call.
class Stream {
 public:
  using Reader = std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>>;

  Stream(std::unique_ptr<grpc::ClientContext> context, const std::function<Reader(grpc::ClientContext*)>& call)
      : context_(std::move(context)), reader_(call(context_.get())) {}

  ~Stream() { drop(); }

  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // Reads the next response; false after the last one.
  bool next(v1::GenerateResponse& response) {
    if (reader_ && reader_->Read(&response)) return true;
    finish();
    return false;
  }

  // Ends the call at once. The server cancels the request unless it was opened detached.
  void drop() {
    if (!reader_) return;
    context_->TryCancel();
    reader_->Finish();
    reader_.reset();
  }

 private:
  void finish() {
    if (!reader_) return;
    grpc::Status status = reader_->Finish();
    reader_.reset();
    if (!status.ok()) throw ServiceError(status);
  }

  std::unique_ptr<grpc::ClientContext> context_;
  Reader reader_;
};

// An id that nobody else uses.
inline std::string new_request_id() {
  static const char digits[] = "0123456789abcdef";
  std::random_device source;
  std::string id;
  for (int i = 0; i < 32; ++i) id += digits[source() % 16];
  return id;
}

// One channel to a gateway; safe for use from several threads.
class Client {
 public:
  // Called by stream before it tries to go on after a break.
  std::function<void(const ServiceError&)> on_break = [](const ServiceError&) {};

  // address: host:port of a gateway, plaintext.
  explicit Client(const std::string& address)
      : stub_(v1::InferenceService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()))) {}

  // What is served.
  std::vector<v1::Model> list_models() {
    auto response = unary(&Stub::ListModels, v1::ListModelsRequest(), v1::ListModelsResponse());
    return {response.models().begin(), response.models().end()};
  }

  // Token ids of a text.
  std::vector<uint32_t> tokenize(const std::string& text) {
    v1::TokenizeRequest request;
    request.set_text(text);
    auto response = unary(&Stub::Tokenize, request, v1::TokenizeResponse());
    return {response.token_ids().begin(), response.token_ids().end()};
  }

  // Text of token ids.
  std::string detokenize(const std::vector<uint32_t>& token_ids) {
    v1::DetokenizeRequest request;
    request.mutable_token_ids()->Add(token_ids.begin(), token_ids.end());
    return unary(&Stub::Detokenize, request, v1::DetokenizeResponse()).text();
  }

  // Ends a request by name. Returns whether it was live.
  bool cancel(const std::string& request_id) {
    v1::CancelRequest request;
    request.set_request_id(request_id);
    return unary(&Stub::Cancel, request, v1::CancelResponse()).found();
  }

  // Starts a request. timeout: the call's deadline, from now; a detached request is not bound to it. detached: the
  // request lives on when the stream is dropped, and can be attached to.
  Stream generate(const v1::GenerateRequest& request, std::optional<milliseconds> timeout = {}, bool detached = false) {
    auto context = std::make_unique<grpc::ClientContext>();
    if (timeout) context->set_deadline(std::chrono::system_clock::now() + *timeout);
    if (detached) context->AddMetadata("pagewire-detach", "true");
    return Stream(std::move(context),
                  [&](grpc::ClientContext* opened) { return stub_->Generate(opened, request); });
  }

  // Continues a request's stream at these positions; an index not named: from token 0.
  Stream attach(const std::string& request_id, const Positions& positions = {}) {
    v1::AttachRequest request;
    request.set_request_id(request_id);
    for (auto [index, first] : positions) {
      auto* position = request.add_positions();
      position->set_index(index);
      position->set_first_token(first);
    }
    return Stream(std::make_unique<grpc::ClientContext>(),
                  [&](grpc::ClientContext* opened) { return stub_->Attach(opened, request); });
  }

  // Generate that survives broken connections. If take throws, the request is cancelled.
  //
  // The request is opened detached under an id of its own. After UNAVAILABLE, Attach asks for the first tokens that
  // have not arrived. resume_for: how long to try without any progress.
  void stream(v1::GenerateRequest request, const std::function<void(const v1::GenerateResponse&)>& take,
              milliseconds resume_for = std::chrono::seconds(30)) {
    if (request.request_id().empty()) request.set_request_id(new_request_id());
    Progress progress(request);
    try {
      follow(request, progress, take, resume_for);
    } catch (...) {
      if (!progress.done()) {
        grpc::ClientContext context;
        context.set_deadline(std::chrono::system_clock::now() + kLongestDelay);
        v1::CancelRequest cancelled;
        cancelled.set_request_id(request.request_id());
        v1::CancelResponse response;
        stub_->Cancel(&context, cancelled, &response);  // if nobody answers, nobody is there to cancel it either
      }
      throw;
    }
  }

 private:
  using Stub = v1::InferenceService::Stub;
  static constexpr milliseconds kFirstDelay{50};
  static constexpr milliseconds kLongestDelay{2000};

  void follow(const v1::GenerateRequest& request, Progress& progress,
              const std::function<void(const v1::GenerateResponse&)>& take, milliseconds resume_for) {
    bool attaching = false, retrying = false;
    milliseconds delay = kFirstDelay;
    auto since = steady_clock::now();
    while (!progress.done()) {
      try {
        Stream call =
            attaching ? attach(request.request_id(), progress.positions()) : generate(request, {}, /*detached=*/true);
        v1::GenerateResponse response;
        while (call.next(response)) {
          delay = kFirstDelay;
          since = steady_clock::now();
          if (progress.accept(response)) take(response);
        }
        if (!progress.done()) {
          throw ServiceError({grpc::StatusCode::UNAVAILABLE, "the stream ended before its last token"});
        }
      } catch (const ServiceError& error) {
        if (progress.done() && error.code == grpc::StatusCode::UNAVAILABLE) return;  // nothing is missing
        attaching = attach_next(error, attaching, retrying, !progress.positions().empty());
        retrying = true;
        if (steady_clock::now() - since > resume_for) throw;
        on_break(error);
        std::this_thread::sleep_for(std::max(delay, error.retry_after.value_or(milliseconds(0))));
        delay = std::min(2 * delay, kLongestDelay);
      }
    }
  }

  // What follows a failed call of stream: Attach (true) or Generate (false). Throws the error if neither helps.
  // attaching: the failed call was Attach. retrying: a call had failed before it, so the server may know the request
  // already. arrived: some tokens have arrived.
  static bool attach_next(const ServiceError& error, bool attaching, bool retrying, bool arrived) {
    if (error.code == grpc::StatusCode::UNAVAILABLE && (retrying || arrived || error.reason.empty())) return true;
    if (error.reason == "SLOW_CONSUMER") return true;
    if (error.code == grpc::StatusCode::ALREADY_EXISTS && retrying) return true;  // the first had reached the server
    if (error.code == grpc::StatusCode::NOT_FOUND && attaching && !arrived) return false;  // it had not
    throw error;
  }

  template <typename Request, typename Response>
  Response unary(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*), const Request& request,
                 Response response) {
    grpc::ClientContext context;
    grpc::Status status = (stub_.get()->*method)(&context, request, &response);
    if (!status.ok()) throw ServiceError(status);
    return response;
  }

  std::unique_ptr<Stub> stub_;
};

}  // namespace pagewire
