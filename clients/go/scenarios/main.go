// Command scenarios runs clients/scenarios.json: scenarios ../scenarios.json service=127.0.0.1:50051
//
// It prints one JSON object per scenario (id, verdict, observed) and exits with 1 if one failed.
package main

import (
	"client"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"
	"time"
	"unicode"

	"google.golang.org/protobuf/encoding/protojson"
	pb "pagewire/v1"
)

type object = map[string]interface{}

type scenario struct {
	ID              string                 `json:"id"`
	Action          string                 `json:"action"`
	At              string                 `json:"at"`
	Text            string                 `json:"text"`
	TimeoutMs       int                    `json:"timeout_ms"`
	AfterTokens     int                    `json:"after_tokens"`
	Request         json.RawMessage        `json:"request"`
	SameSequencesAs string                 `json:"same_sequences_as"`
	Expect          map[string]interface{} `json:"expect"`
}

// request returns the scenario's request (proto3 JSON), under an id that no other run uses.
func (s *scenario) request() *pb.GenerateRequest {
	request := &pb.GenerateRequest{}
	check(protojson.Unmarshal(s.Request, request))
	request.RequestId = s.ID + "-" + client.NewRequestID()
	return request
}

type sequence struct {
	TokenIds []uint32 `json:"token_ids"`
	Text     string   `json:"text"`
	Finish   string   `json:"finish"`
}

// collector gathers responses into what a scenario observes, and checks that there is no gap and no repeat.
type collector struct {
	progress     *client.Progress
	sequences    map[uint32]*sequence
	promptTokens uint32
}

func newCollector(n uint32) *collector {
	return &collector{progress: client.NewProgress(n), sequences: map[uint32]*sequence{}}
}

func (c *collector) add(r *pb.GenerateResponse) error {
	if r.Prompt != nil {
		c.promptTokens = r.Prompt.PromptTokens
	}
	fresh, err := c.progress.Accept(r)
	if err != nil || !fresh {
		return err
	}
	s := c.sequences[r.Index]
	if s == nil {
		s = &sequence{}
		c.sequences[r.Index] = s
	}
	s.TokenIds = append(s.TokenIds, r.TokenIds...)
	s.Text += r.Text
	if r.Finish != nil {
		s.Finish = r.Finish.Reason.String()
	}
	return nil
}

// take reads to the end, or until the first sequence has afterTokens tokens.
func (c *collector) take(call *client.Call, afterTokens int) error {
	for {
		response, err := call.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := c.add(response); err != nil {
			return err
		}
		if afterTokens > 0 && int(c.progress.Positions[0]) >= afterTokens {
			return nil
		}
	}
}

func (c *collector) list() []*sequence {
	result := []*sequence{}
	for index := uint32(0); int(index) < len(c.sequences); index++ {
		result = append(result, c.sequences[index])
	}
	return result
}

func (c *collector) observed() object {
	indices := []uint32{}
	for index := range c.list() {
		indices = append(indices, uint32(index))
	}
	return object{"code": "OK", "prompt_tokens": c.promptTokens, "indices": indices, "sequences": c.list()}
}

func listModels(ctx context.Context, c *client.Client, s *scenario) (object, error) {
	models, err := c.ListModels(ctx)
	list := []object{}
	for _, m := range models {
		list = append(list, object{
			"name": m.Name, "ready": m.Ready, "max_model_len": m.MaxModelLen, "vocab_size": m.VocabSize})
	}
	return object{"models": list}, err
}

func tokenize(ctx context.Context, c *client.Client, s *scenario) (object, error) {
	ids, err := c.Tokenize(ctx, s.Text)
	if err != nil {
		return nil, err
	}
	text, err := c.Detokenize(ctx, ids)
	return object{"token_ids": ids, "text": text}, err
}

func generate(ctx context.Context, c *client.Client, s *scenario) (object, error) {
	if s.TimeoutMs > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(s.TimeoutMs)*time.Millisecond)
		defer cancel()
	}
	request := s.request()
	call, err := c.Generate(ctx, request, false)
	if err != nil {
		return nil, err
	}
	defer call.Drop()
	gathered := newCollector(request.GetSampling().GetN())
	err = gathered.take(call, 0)
	return gathered.observed(), err
}

func repeat(ctx context.Context, c *client.Client, s *scenario) (object, error) {
	first, err := generate(ctx, c, s)
	if err != nil {
		return nil, err
	}
	second, err := generate(ctx, c, s)
	if err != nil {
		return nil, err
	}
	first["equal"] = reflect.DeepEqual(first["sequences"], second["sequences"])
	return first, nil
}

// begin starts the scenario's request and reads its first tokens.
func begin(ctx context.Context, c *client.Client, s *scenario, detached bool) (*pb.GenerateRequest, *client.Call, *collector, error) {
	request := s.request()
	call, err := c.Generate(ctx, request, detached)
	if err != nil {
		return nil, nil, nil, err
	}
	gathered := newCollector(request.GetSampling().GetN())
	if err := gathered.take(call, s.AfterTokens); err != nil {
		return nil, nil, nil, err
	}
	return request, call, gathered, nil
}

// attachAndTake reads the rest of a request.
func attachAndTake(ctx context.Context, c *client.Client, requestID string, gathered *collector) error {
	call, err := c.Attach(ctx, requestID, gathered.progress.Positions)
	if err != nil {
		return err
	}
	defer call.Drop()
	return gathered.take(call, 0)
}

func cancel(ctx context.Context, c *client.Client, s *scenario) (object, error) {
	request, call, gathered, err := begin(ctx, c, s, false)
	if err != nil {
		return nil, err
	}
	found, err := c.Cancel(ctx, request.RequestId)
	if err != nil {
		return nil, err
	}
	if err := gathered.take(call, 0); err != nil {
		return nil, err
	}
	again, err := c.Cancel(ctx, request.RequestId)
	return object{"found": found, "finish": gathered.sequences[0].Finish, "found_again": again}, err
}

func drop(ctx context.Context, c *client.Client, s *scenario) (object, error) {
	request, call, gathered, err := begin(ctx, c, s, false)
	if err != nil {
		return nil, err
	}
	call.Drop()
	// Once this is answered, the drop has arrived too: an Attach would keep the request alive.
	if _, err := c.ListModels(ctx); err != nil {
		return nil, err
	}
	err = attachAndTake(ctx, c, request.RequestId, gathered)
	return object{"finish": gathered.sequences[0].Finish}, err
}

func duplicate(ctx context.Context, c *client.Client, s *scenario) (object, error) {
	request, call, _, err := begin(ctx, c, s, false)
	if err != nil {
		return nil, err
	}
	defer call.Drop()
	second, err := c.Generate(ctx, request, false)
	if err != nil {
		return nil, err
	}
	defer second.Drop()
	return object{"code": "OK"}, newCollector(1).take(second, 0)
}

func attach(ctx context.Context, c *client.Client, s *scenario) (object, error) {
	request, call, gathered, err := begin(ctx, c, s, true)
	if err != nil {
		return nil, err
	}
	call.Drop()
	if err := attachAndTake(ctx, c, request.RequestId, gathered); err != nil {
		return nil, err
	}
	again := newCollector(request.GetSampling().GetN())
	err = attachAndTake(ctx, c, request.RequestId, again)
	observed := gathered.observed()
	observed["whole_again"] = reflect.DeepEqual(again.list(), gathered.list())
	return observed, err
}

func attachUnknown(ctx context.Context, c *client.Client, s *scenario) (object, error) {
	err := attachAndTake(ctx, c, "nobody-"+client.NewRequestID(), newCollector(1))
	return object{"code": "OK"}, err
}

func resume(ctx context.Context, c *client.Client, s *scenario) (object, error) {
	breaks := 0
	c.OnBreak = func(error) { breaks++ }
	request := s.request()
	gathered := newCollector(request.GetSampling().GetN())
	err := c.Stream(ctx, request, gathered.add)
	observed := gathered.observed()
	observed["resumed"] = breaks > 0
	return observed, err
}

func leave(ctx context.Context, c *client.Client, s *scenario) (object, error) {
	enough := errors.New("enough")
	request := s.request()
	gathered := newCollector(request.GetSampling().GetN())
	err := c.Stream(ctx, request, func(r *pb.GenerateResponse) error {
		if err := gathered.add(r); err != nil || int(gathered.progress.Positions[0]) < s.AfterTokens {
			return err
		}
		return enough
	})
	if err != enough {
		return nil, err
	}
	err = attachAndTake(ctx, c, request.RequestId, gathered)
	return object{"finish": gathered.sequences[0].Finish}, err
}

var actions = map[string]func(context.Context, *client.Client, *scenario) (object, error){
	"list_models":    listModels,
	"tokenize":       tokenize,
	"generate":       generate,
	"repeat":         repeat,
	"cancel":         cancel,
	"drop":           drop,
	"duplicate":      duplicate,
	"attach":         attach,
	"attach_unknown": attachUnknown,
	"resume":         resume,
	"leave":          leave,
}

// codeName writes a code as the protocol does: DEADLINE_EXCEEDED, not DeadlineExceeded.
func codeName(name string) string {
	var b strings.Builder
	for i, r := range name {
		if i > 0 && unicode.IsUpper(r) {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToUpper(r))
	}
	return b.String()
}

// observe returns what the action shows, as plain JSON values; an error with its details is an observation too.
func observe(address string, s *scenario) object {
	c, err := client.Dial(address)
	check(err)
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	observed, err := actions[s.Action](ctx, c, s)
	var failed *client.ServiceError
	if errors.As(err, &failed) {
		fields := []string{}
		for _, v := range failed.Violations {
			fields = append(fields, v.Field)
		}
		observed = object{"code": codeName(failed.Code.String()), "reason": failed.Reason, "fields": fields,
			"retry": failed.RetryAfter != nil}
	} else {
		check(err)
	}
	text, err := json.Marshal(observed)
	check(err)
	plain := object{}
	check(json.Unmarshal(text, &plain))
	return plain
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
}

func main() {
	text, err := os.ReadFile(os.Args[1])
	check(err)
	var file struct{ Scenarios []*scenario }
	check(json.Unmarshal(text, &file))
	addresses := map[string]string{}
	for _, pair := range os.Args[2:] {
		parts := strings.SplitN(pair, "=", 2)
		addresses[parts[0]] = parts[1]
	}
	output := json.NewEncoder(os.Stdout)
	output.SetEscapeHTML(false)
	earlier := map[string]object{}
	code := 0
	for _, s := range file.Scenarios {
		if s.At == "" {
			s.At = "service"
		}
		verdict, observed := "skipped", object{}
		if address, known := addresses[s.At]; known {
			verdict, observed = "pass", observe(address, s)
			earlier[s.ID] = observed
			for key, value := range s.Expect {
				if !reflect.DeepEqual(observed[key], value) {
					verdict = "fail"
				}
			}
			if s.SameSequencesAs != "" && !reflect.DeepEqual(observed["sequences"], earlier[s.SameSequencesAs]["sequences"]) {
				verdict = "fail"
			}
		}
		if verdict == "fail" {
			code = 1
		}
		check(output.Encode(object{"id": s.ID, "verdict": verdict, "observed": observed}))
	}
	os.Exit(code)
}
