// Runs clients/scenarios.json: scenarios ../scenarios.json service=127.0.0.1:50051
//
// Prints one JSON object per scenario (id, verdict, observed); exits with 1 if one failed.
#include "pagewire_client.h"

#include <google/protobuf/util/json_util.h>

#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

using nlohmann::json;
using pagewire::Client;
using pagewire::ServiceError;
using pagewire::Stream;
using pagewire::v1::GenerateRequest;
using pagewire::v1::GenerateResponse;

namespace {

// The scenario's request (proto3 JSON), under an id that no other run uses.
GenerateRequest request_of(const json& scenario) {
  GenerateRequest request;
  auto status = google::protobuf::util::JsonStringToMessage(scenario.at("request").dump(), &request);
  if (!status.ok()) throw std::runtime_error(status.ToString());
  request.set_request_id(scenario.at("id").get<std::string>() + "-" + pagewire::new_request_id());
  return request;
}

// Gathers responses into what a scenario observes, and checks that there is no gap and no repeat.
class Collector {
 public:
  explicit Collector(const GenerateRequest& request) : progress(request) {}

  void add(const GenerateResponse& response) {
    if (response.has_prompt()) prompt_tokens_ = response.prompt().prompt_tokens();
    if (!progress.accept(response)) return;
    while (sequences.size() <= response.index()) {
      sequences.push_back({{"token_ids", json::array()}, {"text", ""}, {"finish", ""}});
    }
    json& sequence = sequences[response.index()];
    for (uint32_t token : response.token_ids()) sequence["token_ids"].push_back(token);
    sequence["text"].get_ref<std::string&>() += response.text();
    if (response.has_finish()) sequence["finish"] = pagewire::v1::FinishReason_Name(response.finish().reason());
  }

  // Reads to the end, or until the first sequence has after_tokens tokens, if that is above 0.
  void take(Stream& call, uint32_t after_tokens = 0) {
    GenerateResponse response;
    while (call.next(response)) {
      add(response);
      auto first = progress.positions().find(0);
      if (after_tokens > 0 && first != progress.positions().end() && first->second >= after_tokens) return;
    }
  }

  json observed() const {
    json indices = json::array();
    for (size_t index = 0; index < sequences.size(); ++index) indices.push_back(index);
    return {{"code", "OK"}, {"prompt_tokens", prompt_tokens_}, {"indices", indices}, {"sequences", sequences}};
  }

  pagewire::Progress progress;
  json sequences = json::array();

 private:
  uint32_t prompt_tokens_ = 0;
};

json list_models(Client& client, const json&) {
  json models = json::array();
  for (const auto& model : client.list_models()) {
    models.push_back({{"name", model.name()},
                      {"ready", model.ready()},
                      {"max_model_len", model.max_model_len()},
                      {"vocab_size", model.vocab_size()}});
  }
  return {{"models", models}};
}

json tokenize(Client& client, const json& scenario) {
  auto token_ids = client.tokenize(scenario.at("text"));
  return {{"token_ids", token_ids}, {"text", client.detokenize(token_ids)}};
}

json generate(Client& client, const json& scenario) {
  auto request = request_of(scenario);
  Collector collector(request);
  std::optional<pagewire::milliseconds> timeout;
  if (scenario.contains("timeout_ms")) timeout = pagewire::milliseconds(scenario["timeout_ms"].get<int>());
  auto call = client.generate(request, timeout);
  collector.take(call);
  return collector.observed();
}

json repeat(Client& client, const json& scenario) {
  json first = generate(client, scenario), second = generate(client, scenario);
  first["equal"] = first["sequences"] == second["sequences"];
  return first;
}

json cancel(Client& client, const json& scenario) {
  auto request = request_of(scenario);
  Collector collector(request);
  auto call = client.generate(request);
  collector.take(call, scenario.at("after_tokens"));
  bool found = client.cancel(request.request_id());
  collector.take(call);
  bool again = client.cancel(request.request_id());
  return {{"found", found}, {"finish", collector.sequences[0]["finish"]}, {"found_again", again}};
}

json drop(Client& client, const json& scenario) {
  auto request = request_of(scenario);
  Collector collector(request);
  auto call = client.generate(request);
  collector.take(call, scenario.at("after_tokens"));
  call.drop();
  client.list_models();  // once it is answered, the drop has arrived too: an Attach would keep the request alive
  auto attached = client.attach(request.request_id(), collector.progress.positions());
  collector.take(attached);
  return {{"finish", collector.sequences[0]["finish"]}};
}

json duplicate(Client& client, const json& scenario) {
  auto request = request_of(scenario);
  auto call = client.generate(request);
  Collector(request).take(call, scenario.at("after_tokens"));
  auto second = client.generate(request);
  Collector(request).take(second);
  return {{"code", "OK"}};
}

json attach(Client& client, const json& scenario) {
  auto request = request_of(scenario);
  Collector collector(request), again(request);
  {
    auto call = client.generate(request, {}, /*detached=*/true);
    collector.take(call, scenario.at("after_tokens"));
  }
  auto rest = client.attach(request.request_id(), collector.progress.positions());
  collector.take(rest);
  auto whole = client.attach(request.request_id());
  again.take(whole);
  json observed = collector.observed();
  observed["whole_again"] = again.sequences == collector.sequences;
  return observed;
}

json attach_unknown(Client& client, const json&) {
  auto call = client.attach("nobody-" + pagewire::new_request_id());
  Collector(GenerateRequest()).take(call);
  return {{"code", "OK"}};
}

json resume(Client& client, const json& scenario) {
  auto request = request_of(scenario);
  Collector collector(request);
  int breaks = 0;
  client.on_break = [&](const ServiceError&) { ++breaks; };
  client.stream(request, [&](const GenerateResponse& response) { collector.add(response); });
  json observed = collector.observed();
  observed["resumed"] = breaks > 0;
  return observed;
}

json leave(Client& client, const json& scenario) {
  struct Enough {};
  auto request = request_of(scenario);
  Collector collector(request);
  try {
    client.stream(request, [&](const GenerateResponse& response) {
      collector.add(response);
      if (collector.progress.positions().at(0) >= scenario.at("after_tokens").get<uint32_t>()) throw Enough();
    });
  } catch (const Enough&) {
  }
  auto call = client.attach(request.request_id(), collector.progress.positions());
  collector.take(call);
  return {{"finish", collector.sequences[0]["finish"]}};
}

const std::map<std::string, json (*)(Client&, const json&)> kActions = {
    {"list_models", list_models}, {"tokenize", tokenize},   {"generate", generate},
    {"repeat", repeat},           {"cancel", cancel},       {"drop", drop},
    {"duplicate", duplicate},     {"attach", attach},       {"attach_unknown", attach_unknown},
    {"resume", resume},           {"leave", leave},
};

const std::map<grpc::StatusCode, std::string> kCodes = {
    {grpc::CANCELLED, "CANCELLED"},
    {grpc::UNKNOWN, "UNKNOWN"},
    {grpc::INVALID_ARGUMENT, "INVALID_ARGUMENT"},
    {grpc::DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"},
    {grpc::NOT_FOUND, "NOT_FOUND"},
    {grpc::ALREADY_EXISTS, "ALREADY_EXISTS"},
    {grpc::RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED"},
    {grpc::UNIMPLEMENTED, "UNIMPLEMENTED"},
    {grpc::INTERNAL, "INTERNAL"},
    {grpc::UNAVAILABLE, "UNAVAILABLE"},
};

// What the action shows; an error with its details is an observation too.
json observe(const std::string& address, const json& scenario) {
  Client client(address);
  try {
    return kActions.at(scenario.at("action"))(client, scenario);
  } catch (const ServiceError& error) {
    json fields = json::array();
    for (const auto& violation : error.violations) fields.push_back(violation.field);
    return {{"code", kCodes.at(error.code)},
            {"reason", error.reason},
            {"fields", fields},
            {"retry", error.retry_after.has_value()}};
  }
}

}  // namespace

int main(int count, char** arguments) {
  std::map<std::string, std::string> addresses;
  for (int place = 2; place < count; ++place) {
    std::string pair = arguments[place];
    addresses[pair.substr(0, pair.find('='))] = pair.substr(pair.find('=') + 1);
  }
  std::ifstream input(arguments[1]);
  const json file = json::parse(input);
  std::map<std::string, json> earlier;
  int code = 0;
  for (const json& scenario : file.at("scenarios")) {
    std::string id = scenario.at("id"), verdict = "skipped";
    json observed = json::object();
    auto address = addresses.find(scenario.value("at", "service"));
    if (address != addresses.end()) {
      observed = earlier[id] = observe(address->second, scenario);
      bool good = true;
      for (const auto& [key, value] : scenario.at("expect").items()) {
        good = good && observed.contains(key) && observed[key] == value;
      }
      std::string same = scenario.value("same_sequences_as", "");
      good = good && (same.empty() || earlier[same]["sequences"] == observed["sequences"]);
      verdict = good ? "pass" : "fail";
      if (!good) code = 1;
    }
    std::cout << json{{"id", id}, {"verdict", verdict}, {"observed", observed}}.dump() << std::endl;
  }
  return code;
}
