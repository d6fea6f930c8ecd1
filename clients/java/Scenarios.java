import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import com.google.protobuf.util.JsonFormat;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.UUID;
import java.util.concurrent.atomic.AtomicInteger;
import pagewire.v1.Inference.GenerateRequest;
import pagewire.v1.Inference.GenerateResponse;

/**
 * Runs clients/scenarios.json: {@code java Scenarios ../scenarios.json service=127.0.0.1:50051}.
 *
 * <p>Prints one JSON object per scenario (id, verdict, observed); exits with 1 if one failed.
 */
public final class Scenarios {
  private static final Gson GSON = new GsonBuilder().disableHtmlEscaping().create();

  private interface Action {
    Map<String, Object> run(PagewireClient client, JsonObject scenario) throws Exception;
  }

  private static final Map<String, Action> ACTIONS =
      Map.ofEntries(
          Map.entry("list_models", Scenarios::listModels),
          Map.entry("tokenize", Scenarios::tokenize),
          Map.entry("generate", Scenarios::generate),
          Map.entry("repeat", Scenarios::repeat),
          Map.entry("cancel", Scenarios::cancel),
          Map.entry("drop", Scenarios::drop),
          Map.entry("duplicate", Scenarios::duplicate),
          Map.entry("attach", Scenarios::attach),
          Map.entry("attach_unknown", Scenarios::attachUnknown),
          Map.entry("resume", Scenarios::resume),
          Map.entry("leave", Scenarios::leave));

  /** One sequence as it is observed. */
  private static final class Sequence {
    final List<Integer> token_ids = new ArrayList<>();
    String text = "";
    String finish = "";
  }

  /** Gathers responses into what a scenario observes, and checks that there is no gap and no repeat. */
  private static final class Collector {
    final PagewireClient.Progress progress;
    final TreeMap<Integer, Sequence> sequences = new TreeMap<>();
    int promptTokens;

    Collector(GenerateRequest request) {
      progress = new PagewireClient.Progress(request);
    }

    void add(GenerateResponse response) {
      if (response.hasPrompt()) {
        promptTokens = response.getPrompt().getPromptTokens();
      }
      if (!progress.accept(response)) {
        return;
      }
      Sequence sequence = sequences.computeIfAbsent(response.getIndex(), index -> new Sequence());
      sequence.token_ids.addAll(response.getTokenIdsList());
      sequence.text += response.getText();
      if (response.hasFinish()) {
        sequence.finish = response.getFinish().getReason().name();
      }
    }

    /** Reads to the end, or until the first sequence has {@code afterTokens} tokens, if that is above 0. */
    Collector take(PagewireClient.Stream call, int afterTokens) throws PagewireClient.ServiceException {
      GenerateResponse response;
      while ((response = call.next()) != null) {
        add(response);
        if (afterTokens > 0 && progress.positions.getOrDefault(0, 0) >= afterTokens) {
          break;
        }
      }
      return this;
    }

    Map<String, Object> observed() {
      Map<String, Object> observed = new LinkedHashMap<>();
      observed.put("code", "OK");
      observed.put("prompt_tokens", promptTokens);
      observed.put("indices", sequences.keySet());
      observed.put("sequences", sequences.values());
      return observed;
    }
  }

  /** The scenario's request (proto3 JSON), under an id that no other run uses. */
  private static GenerateRequest requestOf(JsonObject scenario) throws Exception {
    var request = GenerateRequest.newBuilder();
    JsonFormat.parser().merge(scenario.get("request").toString(), request);
    return request.setRequestId(scenario.get("id").getAsString() + "-" + UUID.randomUUID()).build();
  }

  private static int afterTokens(JsonObject scenario) {
    return scenario.get("after_tokens").getAsInt();
  }

  private static Map<String, Object> listModels(PagewireClient client, JsonObject scenario) throws Exception {
    List<Object> models = new ArrayList<>();
    for (var model : client.listModels()) {
      models.add(
          Map.of(
              "name", model.getName(),
              "ready", model.getReady(),
              "max_model_len", model.getMaxModelLen(),
              "vocab_size", model.getVocabSize()));
    }
    return Map.of("models", models);
  }

  private static Map<String, Object> tokenize(PagewireClient client, JsonObject scenario) throws Exception {
    List<Integer> tokenIds = client.tokenize(scenario.get("text").getAsString());
    return Map.of("token_ids", tokenIds, "text", client.detokenize(tokenIds));
  }

  private static Map<String, Object> generate(PagewireClient client, JsonObject scenario) throws Exception {
    GenerateRequest request = requestOf(scenario);
    var limit = scenario.get("timeout_ms");
    Duration timeout = limit == null ? null : Duration.ofMillis(limit.getAsLong());
    try (var call = client.generate(request, timeout, false)) {
      return new Collector(request).take(call, 0).observed();
    }
  }

  private static Map<String, Object> repeat(PagewireClient client, JsonObject scenario) throws Exception {
    var first = generate(client, scenario);
    var second = generate(client, scenario);
    first.put("equal", GSON.toJson(first).equals(GSON.toJson(second)));
    return first;
  }

  private static Map<String, Object> cancel(PagewireClient client, JsonObject scenario) throws Exception {
    GenerateRequest request = requestOf(scenario);
    Collector collector = new Collector(request);
    try (var call = client.generate(request, null, false)) {
      collector.take(call, afterTokens(scenario));
      boolean found = client.cancel(request.getRequestId());
      collector.take(call, 0);
      boolean again = client.cancel(request.getRequestId());
      return Map.of("found", found, "finish", collector.sequences.get(0).finish, "found_again", again);
    }
  }

  private static Map<String, Object> drop(PagewireClient client, JsonObject scenario) throws Exception {
    GenerateRequest request = requestOf(scenario);
    Collector collector = new Collector(request);
    try (var call = client.generate(request, null, false)) {
      collector.take(call, afterTokens(scenario));
    }
    client.listModels(); // once it is answered, the drop has arrived too: an Attach would keep the request alive
    try (var call = client.attach(request.getRequestId(), collector.progress.positions)) {
      collector.take(call, 0);
    }
    return Map.of("finish", collector.sequences.get(0).finish);
  }

  private static Map<String, Object> duplicate(PagewireClient client, JsonObject scenario) throws Exception {
    GenerateRequest request = requestOf(scenario);
    try (var call = client.generate(request, null, false)) {
      new Collector(request).take(call, afterTokens(scenario));
      try (var second = client.generate(request, null, false)) {
        return new Collector(request).take(second, 0).observed();
      }
    }
  }

  private static Map<String, Object> attach(PagewireClient client, JsonObject scenario) throws Exception {
    GenerateRequest request = requestOf(scenario);
    Collector collector = new Collector(request);
    try (var call = client.generate(request, null, true)) {
      collector.take(call, afterTokens(scenario));
    }
    try (var call = client.attach(request.getRequestId(), collector.progress.positions)) {
      collector.take(call, 0);
    }
    Collector again = new Collector(request);
    try (var call = client.attach(request.getRequestId(), Map.of())) {
      again.take(call, 0);
    }
    var observed = collector.observed();
    observed.put("whole_again", GSON.toJson(again.sequences).equals(GSON.toJson(collector.sequences)));
    return observed;
  }

  private static Map<String, Object> attachUnknown(PagewireClient client, JsonObject scenario) throws Exception {
    try (var call = client.attach("nobody-" + UUID.randomUUID(), Map.of())) {
      return new Collector(GenerateRequest.getDefaultInstance()).take(call, 0).observed();
    }
  }

  private static Map<String, Object> resume(PagewireClient client, JsonObject scenario) throws Exception {
    GenerateRequest request = requestOf(scenario);
    Collector collector = new Collector(request);
    AtomicInteger breaks = new AtomicInteger();
    client.onBreak = error -> breaks.incrementAndGet();
    client.stream(request, collector::add);
    var observed = collector.observed();
    observed.put("resumed", breaks.get() > 0);
    return observed;
  }

  private static Map<String, Object> leave(PagewireClient client, JsonObject scenario) throws Exception {
    GenerateRequest request = requestOf(scenario);
    Collector collector = new Collector(request);
    var enough = new RuntimeException("enough");
    try {
      client.stream(
          request,
          response -> {
            collector.add(response);
            if (collector.progress.positions.get(0) >= afterTokens(scenario)) {
              throw enough;
            }
          });
    } catch (RuntimeException left) {
      if (left != enough) {
        throw left;
      }
    }
    try (var call = client.attach(request.getRequestId(), collector.progress.positions)) {
      collector.take(call, 0);
    }
    return Map.of("finish", collector.sequences.get(0).finish);
  }

  /** What the action shows; an error with its details is an observation too. */
  private static JsonObject observe(String address, JsonObject scenario) throws Exception {
    Map<String, Object> observed;
    try (PagewireClient client = new PagewireClient(address)) {
      observed = ACTIONS.get(scenario.get("action").getAsString()).run(client, scenario);
    } catch (PagewireClient.ServiceException error) {
      var fields = error.violations.stream().map(PagewireClient.Violation::field).toList();
      observed =
          Map.of(
              "code", error.code.name(),
              "reason", error.reason,
              "fields", fields,
              "retry", error.retryAfter != null);
    }
    return JsonParser.parseString(GSON.toJson(observed)).getAsJsonObject();
  }

  private static boolean meets(JsonObject observed, JsonObject scenario, Map<String, JsonObject> earlier) {
    for (Map.Entry<String, JsonElement> expected : scenario.getAsJsonObject("expect").entrySet()) {
      if (!expected.getValue().equals(observed.get(expected.getKey()))) {
        return false;
      }
    }
    var same = scenario.get("same_sequences_as");
    return same == null || earlier.get(same.getAsString()).get("sequences").equals(observed.get("sequences"));
  }

  public static void main(String[] arguments) throws Exception {
    Map<String, String> addresses = new HashMap<>();
    for (int place = 1; place < arguments.length; place++) {
      String[] pair = arguments[place].split("=", 2);
      addresses.put(pair[0], pair[1]);
    }
    PrintStream output = new PrintStream(System.out, true, StandardCharsets.UTF_8);
    Map<String, JsonObject> earlier = new HashMap<>();
    boolean failed = false;
    var file = JsonParser.parseString(Files.readString(Path.of(arguments[0]))).getAsJsonObject();
    for (JsonElement element : file.getAsJsonArray("scenarios")) {
      JsonObject scenario = element.getAsJsonObject();
      String id = scenario.get("id").getAsString();
      String at = scenario.has("at") ? scenario.get("at").getAsString() : "service";
      String verdict = "skipped";
      JsonObject observed = new JsonObject();
      if (addresses.containsKey(at)) {
        observed = observe(addresses.get(at), scenario);
        earlier.put(id, observed);
        verdict = meets(observed, scenario, earlier) ? "pass" : "fail";
      }
      failed |= verdict.equals("fail");
      JsonObject line = new JsonObject();
      line.addProperty("id", id);
      line.addProperty("verdict", verdict);
      line.add("observed", observed);
      output.println(GSON.toJson(line));
    }
    System.exit(failed ? 1 : 0);
  }
}
