import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Context;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashSet;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.UUID;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import java.util.function.Supplier;
import pagewire.v1.Inference.AttachRequest;
import pagewire.v1.Inference.CancelRequest;
import pagewire.v1.Inference.DetokenizeRequest;
import pagewire.v1.Inference.GenerateRequest;
import pagewire.v1.Inference.GenerateResponse;
import pagewire.v1.Inference.ListModelsRequest;
import pagewire.v1.Inference.Model;
import pagewire.v1.Inference.SequencePosition;
import pagewire.v1.Inference.TokenizeRequest;
import pagewire.v1.InferenceServiceGrpc;
import pagewire.v1.InferenceServiceGrpc.InferenceServiceBlockingStub;

/**
 * A client of pagewire.v1.InferenceService made from its protocol alone: grpc-java and generated code.
 *
 * <pre>{@code
 * try (var client = new PagewireClient("127.0.0.1:50051")) {
 *   client.stream(request, response -> System.out.print(response.getText()));
 * }
 * }</pre>
 *
 * {@link #generate} and {@link #attach} are the calls as they are. {@link #stream} adds what gRPC does not do: it goes on
 * after a broken connection, without a gap and without a repeat. Safe for use from several threads.
 */
public final class PagewireClient implements AutoCloseable {
  private static final Duration FIRST_DELAY = Duration.ofMillis(50);
  private static final Duration LONGEST_DELAY = Duration.ofSeconds(2);

  /** How long {@link #stream} tries without any progress. */
  private static final Duration RESUME_FOR = Duration.ofSeconds(30);

  private final ManagedChannel channel;
  private final InferenceServiceBlockingStub stub;

  /** Called by {@link #stream} before it tries to go on after a break. */
  public volatile Consumer<ServiceException> onBreak = error -> {};

  /** Connects to a gateway at {@code host:port}, in plaintext. */
  public PagewireClient(String address) {
    channel = ManagedChannelBuilder.forTarget(address).usePlaintext().build();
    stub = InferenceServiceGrpc.newBlockingStub(channel);
  }

  @Override
  public void close() {
    channel.shutdownNow();
  }

  /** One wrong field of a request. */
  public record Violation(String field, String description) {}

  /** A call's status with its details. */
  public static final class ServiceException extends Exception {
    public final Status.Code code;

    /** ErrorInfo.reason, one of docs/errors.md; empty where no server answered. */
    public final String reason;

    /** From BadRequest. */
    public final List<Violation> violations;

    /** From RetryInfo; null: a retry does not help. */
    public final Duration retryAfter;

    ServiceException(Status.Code code, String message, String reason, List<Violation> violations, Duration retryAfter) {
      super(message);
      this.code = code;
      this.reason = reason;
      this.violations = violations;
      this.retryAfter = retryAfter;
    }

    /** Reads the details out of grpc-status-details-bin, a serialized google.rpc.Status. */
    static ServiceException of(StatusRuntimeException error) {
      String reason = "";
      List<Violation> violations = new ArrayList<>();
      Duration retryAfter = null;
      var details = StatusProto.fromThrowable(error);
      try {
        for (Any detail : details == null ? List.<Any>of() : details.getDetailsList()) {
          if (detail.is(ErrorInfo.class)) {
            reason = detail.unpack(ErrorInfo.class).getReason();
          } else if (detail.is(BadRequest.class)) {
            for (var violation : detail.unpack(BadRequest.class).getFieldViolationsList()) {
              violations.add(new Violation(violation.getField(), violation.getDescription()));
            }
          } else if (detail.is(RetryInfo.class)) {
            var delay = detail.unpack(RetryInfo.class).getRetryDelay();
            retryAfter = Duration.ofSeconds(delay.getSeconds(), delay.getNanos());
          }
        }
      } catch (InvalidProtocolBufferException malformed) {
        // The status itself is still worth telling.
      }
      Status status = error.getStatus();
      return new ServiceException(status.getCode(), status.getDescription(), reason, violations, retryAfter);
    }
  }

  /** What has arrived of a request's sequences. */
  public static final class Progress {
    /** First token wanted, by index: what Attach needs to go on. */
    public final Map<Integer, Integer> positions = new TreeMap<>();

    private final Set<Integer> finished = new HashSet<>();
    private final int sequences;

    public Progress(GenerateRequest request) {
      sequences = Math.max(1, request.getSampling().getN());
    }

    /** Whether every sequence has finished. */
    public boolean done() {
      return finished.size() == sequences;
    }

    /** Takes a response. False: it only repeats the end of a sequence that had finished before a break. */
    public boolean accept(GenerateResponse response) {
      int index = response.getIndex();
      if (finished.contains(index)) {
        return false;
      }
      int expected = positions.getOrDefault(index, 0);
      if (response.getFirstToken() != expected) {
        throw new IllegalStateException(
            "sequence " + index + ": token " + response.getFirstToken() + " instead of " + expected);
      }
      positions.put(index, expected + response.getTokenIdsCount());
      if (response.hasFinish()) {
        finished.add(index);
      }
      return true;
    }
  }

  /** The responses of one Generate or Attach call, which must be read to its end or closed. */
  public static final class Stream implements AutoCloseable {
    private final Context.CancellableContext context = Context.current().withCancellation();
    private final Iterator<GenerateResponse> responses;

    Stream(Supplier<Iterator<GenerateResponse>> call) {
      Context previous = context.attach();
      try {
        responses = call.get();
      } finally {
        context.detach(previous);
      }
    }

    /** The next response; null after the last one. */
    public GenerateResponse next() throws ServiceException {
      try {
        return responses.hasNext() ? responses.next() : null;
      } catch (StatusRuntimeException error) {
        throw ServiceException.of(error);
      }
    }

    /** Ends the call at once. The server cancels the request unless it was opened detached. */
    @Override
    public void close() {
      context.cancel(null);
    }
  }

  /** What is served. */
  public List<Model> listModels() throws ServiceException {
    return unary(() -> stub.listModels(ListModelsRequest.getDefaultInstance()).getModelsList());
  }

  /** Token ids of a text. */
  public List<Integer> tokenize(String text) throws ServiceException {
    return unary(() -> stub.tokenize(TokenizeRequest.newBuilder().setText(text).build()).getTokenIdsList());
  }

  /** Text of token ids. */
  public String detokenize(List<Integer> tokenIds) throws ServiceException {
    return unary(() -> stub.detokenize(DetokenizeRequest.newBuilder().addAllTokenIds(tokenIds).build()).getText());
  }

  /** Ends a request by name. Returns whether it was live. */
  public boolean cancel(String requestId) throws ServiceException {
    return unary(() -> stub.cancel(CancelRequest.newBuilder().setRequestId(requestId).build()).getFound());
  }

  /**
   * Starts a request.
   *
   * @param timeout the call's deadline, from now; null: none. A detached request is not bound to it.
   * @param detached the request lives on when the stream is closed, and can be attached to.
   */
  public Stream generate(GenerateRequest request, Duration timeout, boolean detached) {
    InferenceServiceBlockingStub called = stub;
    if (timeout != null) {
      called = called.withDeadlineAfter(timeout.toNanos(), TimeUnit.NANOSECONDS);
    }
    if (detached) {
      Metadata metadata = new Metadata();
      metadata.put(Metadata.Key.of("pagewire-detach", Metadata.ASCII_STRING_MARSHALLER), "true");
      called = called.withInterceptors(MetadataUtils.newAttachHeadersInterceptor(metadata));
    }
    InferenceServiceBlockingStub configured = called;
    return new Stream(() -> configured.generate(request));
  }

  /**
   * Continues a request's stream.
   *
   * @param positions first token wanted, by index; an index not named: from token 0.
   */
  public Stream attach(String requestId, Map<Integer, Integer> positions) {
    var request = AttachRequest.newBuilder().setRequestId(requestId);
    positions.forEach(
        (index, first) -> request.addPositions(SequencePosition.newBuilder().setIndex(index).setFirstToken(first)));
    return new Stream(() -> stub.attach(request.build()));
  }

  /**
   * Generate that survives broken connections. If {@code take} throws, or the thread is interrupted, the request is
   * cancelled.
   *
   * <p>The request is opened detached under an id of its own. After UNAVAILABLE, Attach asks for the first tokens that have
   * not arrived.
   */
  public void stream(GenerateRequest request, Consumer<GenerateResponse> take)
      throws ServiceException, InterruptedException {
    String requestId = request.getRequestId().isEmpty() ? UUID.randomUUID().toString() : request.getRequestId();
    GenerateRequest opened = request.toBuilder().setRequestId(requestId).build();
    Progress progress = new Progress(request);
    boolean attaching = false;
    boolean retrying = false;
    Duration delay = FIRST_DELAY;
    long since = System.nanoTime();
    try {
      while (!progress.done()) {
        try (Stream call = attaching ? attach(requestId, progress.positions) : generate(opened, null, true)) {
          GenerateResponse response;
          while ((response = call.next()) != null) {
            delay = FIRST_DELAY;
            since = System.nanoTime();
            if (progress.accept(response)) {
              take.accept(response);
            }
          }
          if (!progress.done()) {
            throw new ServiceException(
                Status.Code.UNAVAILABLE, "the stream ended before its last token", "", List.of(), null);
          }
        } catch (ServiceException error) {
          if (progress.done() && error.code == Status.Code.UNAVAILABLE) {
            return; // nothing is missing
          }
          attaching = attachNext(error, attaching, retrying, !progress.positions.isEmpty());
          retrying = true;
          if (System.nanoTime() - since > RESUME_FOR.toNanos()) {
            throw error;
          }
          onBreak.accept(error);
          boolean advised = error.retryAfter != null && error.retryAfter.compareTo(delay) > 0;
          Thread.sleep((advised ? error.retryAfter : delay).toMillis());
          delay = delay.multipliedBy(2).compareTo(LONGEST_DELAY) < 0 ? delay.multipliedBy(2) : LONGEST_DELAY;
        }
      }
    } finally {
      if (!progress.done()) {
        cancelQuietly(requestId);
      }
    }
  }

  /** If nobody answers, nobody is there to cancel it either. */
  private void cancelQuietly(String requestId) {
    try {
      stub.withDeadlineAfter(LONGEST_DELAY.toMillis(), TimeUnit.MILLISECONDS)
          .cancel(CancelRequest.newBuilder().setRequestId(requestId).build());
    } catch (StatusRuntimeException error) {
      // What made the caller leave says more.
    }
  }

  /**
   * What follows a failed call of stream: Attach (true) or Generate (false). Throws the error if neither helps.
   *
   * @param attaching the failed call was Attach.
   * @param retrying a call had failed before it, so the server may know the request already.
   * @param arrived some tokens have arrived.
   */
  private static boolean attachNext(ServiceException error, boolean attaching, boolean retrying, boolean arrived)
      throws ServiceException {
    if (error.code == Status.Code.UNAVAILABLE && (retrying || arrived || error.reason.isEmpty())) {
      return true;
    }
    if (error.reason.equals("SLOW_CONSUMER")) {
      return true;
    }
    if (error.code == Status.Code.ALREADY_EXISTS && retrying) {
      return true; // the first Generate had reached the server after all
    }
    if (error.code == Status.Code.NOT_FOUND && attaching && !arrived) {
      return false; // it had not
    }
    throw error;
  }

  private static <T> T unary(Supplier<T> call) throws ServiceException {
    try {
      return call.get();
    } catch (StatusRuntimeException error) {
      throw ServiceException.of(error);
    }
  }
}
