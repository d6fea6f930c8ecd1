// Package client is a client of pagewire.v1.InferenceService made from its protocol alone: grpc-go and generated code.
//
//	c, err := client.Dial("127.0.0.1:50051")
//	err = c.Stream(ctx, request, func(r *pb.GenerateResponse) error {
//		fmt.Print(r.Text)
//		return nil
//	})
//
// Generate and Attach are the calls as they are. Stream adds what gRPC does not do: it goes on after a broken connection,
// without a gap and without a repeat.
package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	pb "pagewire/v1"
)

const (
	firstDelay   = 50 * time.Millisecond
	longestDelay = 2 * time.Second
	// resumeFor is how long Stream tries without any progress.
	resumeFor = 30 * time.Second
)

// Violation is one wrong field of a request, from google.rpc.BadRequest.
type Violation struct{ Field, Description string }

// ServiceError is a call's status with its details.
type ServiceError struct {
	Code    codes.Code
	Message string
	// Reason is google.rpc.ErrorInfo.reason, one of docs/errors.md; empty where no server answered.
	Reason     string
	Violations []Violation
	// RetryAfter is from google.rpc.RetryInfo; nil: a retry does not help.
	RetryAfter *time.Duration
}

func (e *ServiceError) Error() string { return fmt.Sprintf("%v %s: %s", e.Code, e.Reason, e.Message) }

// rich reads the details out of grpc-status-details-bin, which grpc-go has decoded.
func rich(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	s := status.Convert(err)
	result := &ServiceError{Code: s.Code(), Message: s.Message()}
	for _, detail := range s.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			result.Reason = d.Reason
		case *errdetails.BadRequest:
			for _, v := range d.FieldViolations {
				result.Violations = append(result.Violations, Violation{v.Field, v.Description})
			}
		case *errdetails.RetryInfo:
			delay := time.Duration(d.RetryDelay.GetSeconds())*time.Second + time.Duration(d.RetryDelay.GetNanos())
			result.RetryAfter = &delay
		}
	}
	return result
}

// Progress is what has arrived of a request's sequences.
type Progress struct {
	// Positions holds the first token wanted by index: what Attach needs to go on.
	Positions map[uint32]uint32
	finished  map[uint32]bool
	sequences int
}

// NewProgress is for a request of n sequences; 0 means 1.
func NewProgress(n uint32) *Progress {
	if n == 0 {
		n = 1
	}
	return &Progress{map[uint32]uint32{}, map[uint32]bool{}, int(n)}
}

// Done says whether every sequence has finished.
func (p *Progress) Done() bool { return len(p.finished) == p.sequences }

// Accept takes a response. False: it only repeats the end of a sequence that had finished before a break. A gap or a
// repeat is an error.
func (p *Progress) Accept(r *pb.GenerateResponse) (bool, error) {
	if p.finished[r.Index] {
		return false, nil
	}
	expected := p.Positions[r.Index]
	if r.FirstToken != expected {
		return false, fmt.Errorf("sequence %d: token %d instead of %d", r.Index, r.FirstToken, expected)
	}
	p.Positions[r.Index] = expected + uint32(len(r.TokenIds))
	if r.Finish != nil {
		p.finished[r.Index] = true
	}
	return true, nil
}

// Call is the stream of one Generate or Attach.
type Call struct {
	stream interface {
		Recv() (*pb.GenerateResponse, error)
	}
	cancel context.CancelFunc
}

// Recv returns the next response; io.EOF after the last one, a *ServiceError if the call failed.
func (c *Call) Recv() (*pb.GenerateResponse, error) {
	response, err := c.stream.Recv()
	return response, rich(err)
}

// Drop ends the call at once. The server cancels the request unless it was opened detached. Every call must be read to
// its end or dropped.
func (c *Call) Drop() { c.cancel() }

// Client is one connection to a gateway, safe for concurrent use.
type Client struct {
	connection *grpc.ClientConn
	stub       pb.InferenceServiceClient
	// OnBreak, if set, is called by Stream before it tries to go on after a break.
	OnBreak func(error)
}

// Dial connects to a gateway at host:port, in plaintext.
func Dial(address string) (*Client, error) {
	connection, err := grpc.Dial(address, grpc.WithInsecure())
	if err != nil {
		return nil, err
	}
	return &Client{connection: connection, stub: pb.NewInferenceServiceClient(connection)}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.connection.Close() }

// ListModels returns what is served.
func (c *Client) ListModels(ctx context.Context) ([]*pb.Model, error) {
	response, err := c.stub.ListModels(ctx, &pb.ListModelsRequest{})
	return response.GetModels(), rich(err)
}

// Tokenize returns the token ids of a text.
func (c *Client) Tokenize(ctx context.Context, text string) ([]uint32, error) {
	response, err := c.stub.Tokenize(ctx, &pb.TokenizeRequest{Input: &pb.TokenizeRequest_Text{Text: text}})
	return response.GetTokenIds(), rich(err)
}

// Detokenize returns the text of token ids.
func (c *Client) Detokenize(ctx context.Context, ids []uint32) (string, error) {
	response, err := c.stub.Detokenize(ctx, &pb.DetokenizeRequest{TokenIds: ids})
	return response.GetText(), rich(err)
}

// Cancel ends a request by name. It returns whether it was live.
func (c *Client) Cancel(ctx context.Context, requestID string) (bool, error) {
	response, err := c.stub.Cancel(ctx, &pb.CancelRequest{RequestId: requestID})
	return response.GetFound(), rich(err)
}

// Generate starts a request. A detached one lives on when the call is dropped, and is not bound to ctx's deadline.
func (c *Client) Generate(ctx context.Context, request *pb.GenerateRequest, detached bool) (*Call, error) {
	if detached {
		ctx = metadata.AppendToOutgoingContext(ctx, "pagewire-detach", "true")
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.stub.Generate(ctx, request)
	if err != nil {
		cancel()
		return nil, rich(err)
	}
	return &Call{stream, cancel}, nil
}

// Attach continues a request's stream. positions: first token wanted by index; an index not named: from token 0.
func (c *Client) Attach(ctx context.Context, requestID string, positions map[uint32]uint32) (*Call, error) {
	request := &pb.AttachRequest{RequestId: requestID}
	for index, first := range positions {
		request.Positions = append(request.Positions, &pb.SequencePosition{Index: index, FirstToken: first})
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.stub.Attach(ctx, request)
	if err != nil {
		cancel()
		return nil, rich(err)
	}
	return &Call{stream, cancel}, nil
}

// Stream is Generate that survives broken connections. It gives every response to take; an error of take, or the end of
// ctx, cancels the request.
//
// The request is opened detached under an id of its own. After UNAVAILABLE, Attach asks for the first tokens that have
// not arrived.
func (c *Client) Stream(ctx context.Context, request *pb.GenerateRequest, take func(*pb.GenerateResponse) error) error {
	if request.RequestId == "" {
		request.RequestId = NewRequestID()
	}
	progress := NewProgress(request.GetSampling().GetN())
	defer func() {
		if !progress.Done() {
			cleanup, cancel := context.WithTimeout(context.Background(), longestDelay)
			defer cancel()
			c.Cancel(cleanup, request.RequestId)
		}
	}()
	attaching, retrying := false, false
	delay, since := firstDelay, time.Now()
	for {
		var call *Call
		var err error
		if attaching {
			call, err = c.Attach(ctx, request.RequestId, progress.Positions)
		} else {
			call, err = c.Generate(ctx, request, true)
		}
		if err == nil {
			var arrived int
			arrived, err = read(call, progress, take)
			if arrived > 0 {
				delay, since = firstDelay, time.Now()
			}
		}
		var broken *ServiceError
		if !errors.As(err, &broken) {
			return err
		}
		if progress.Done() && broken.Code == codes.Unavailable {
			return nil // nothing is missing
		}
		if attaching, err = attachNext(broken, attaching, retrying, len(progress.Positions) > 0); err != nil {
			return err
		}
		retrying = true
		if time.Since(since) > resumeFor {
			return broken
		}
		if c.OnBreak != nil {
			c.OnBreak(broken)
		}
		if broken.RetryAfter != nil && *broken.RetryAfter > delay {
			delay = *broken.RetryAfter
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return ctx.Err()
		}
		if delay *= 2; delay > longestDelay {
			delay = longestDelay
		}
	}
}

// read takes the responses of one call and returns how many there were, and why it ended.
func read(call *Call, progress *Progress, take func(*pb.GenerateResponse) error) (arrived int, err error) {
	defer call.Drop()
	for {
		response, err := call.Recv()
		if err == io.EOF && progress.Done() {
			return arrived, nil
		}
		if err == io.EOF {
			return arrived, &ServiceError{Code: codes.Unavailable, Message: "the stream ended before its last token"}
		}
		if err != nil {
			return arrived, err
		}
		arrived++
		fresh, err := progress.Accept(response)
		if err == nil && fresh {
			err = take(response)
		}
		if err != nil {
			return arrived, err
		}
	}
}

// attachNext says what follows a call of Stream that failed: Attach (true) or Generate (false), or the error if neither
// helps. attaching: the failed call was Attach. retrying: a call had failed before it, so the server may know the request
// already. arrived: some tokens have arrived.
func attachNext(err *ServiceError, attaching, retrying, arrived bool) (bool, error) {
	switch {
	case err.Code == codes.Unavailable && (retrying || arrived || err.Reason == ""):
		return true, nil
	case err.Reason == "SLOW_CONSUMER":
		return true, nil
	case err.Code == codes.AlreadyExists && retrying:
		return true, nil // the first Generate had reached the server after all
	case err.Code == codes.NotFound && attaching && !arrived:
		return false, nil // it had not
	}
	return false, err
}

// NewRequestID returns an id that nobody else uses.
func NewRequestID() string {
	bytes := make([]byte, 16)
	if _, err := rand.Read(bytes); err != nil {
		panic(err)
	}
	return hex.EncodeToString(bytes)
}
