package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// sample is one token request and its outcome.
type sample struct {
	began, ended time.Time
	status       int
	reason       string // of a refusal; the whole body if it is not the expected JSON
	app, token   string // appid and uti of the token
}

// sampler requests tokens from a pod's network namespace and keeps the outcome of each request. Its workers do not pause
// between requests.
type sampler struct {
	t       *testing.T
	pod     string
	cancel  context.CancelFunc
	workers sync.WaitGroup

	mu      sync.Mutex
	samples []sample
	claims  map[string]azure.Claims // by token
}

const askVault = "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + vault

// podClient returns a client that sends requests from the pod's network namespace. The client also works while the API
// server is stopped. With newConnections, it opens a connection for each request.
func (s *testNamespace) podClient(pod string, newConnections bool) *http.Client {
	s.t.Helper()
	netns, err := testCluster.PodNetns(s.t.Context(), s.name, pod)
	must(s.t, err)
	s.t.Cleanup(func() { netns.Close() })
	dial := cluster.DialFrom(fmt.Sprintf("/proc/self/fd/%d", netns.Fd()), nil)
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DialContext: withoutTimeWait(dial), DisableKeepAlives: newConnections}}
}

// startSampler starts two workers, one of which opens a connection for each request. The workers end after ten minutes
// at the latest.
func (s *testNamespace) startSampler(pod string) *sampler {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	w := &sampler{t: s.t, pod: pod, cancel: cancel, claims: map[string]azure.Claims{}}
	for _, newConnections := range []bool{true, false} {
		client := s.podClient(pod, newConnections)
		w.workers.Go(func() {
			for ctx.Err() == nil {
				one := sample{began: time.Now()}
				status, body := get(ctx, client, askVault)
				one.ended, one.status = time.Now(), status
				if ctx.Err() == nil {
					w.record(one, body)
				}
			}
		})
	}
	s.t.Cleanup(w.stop)
	return w
}

func (w *sampler) stop() {
	w.cancel()
	w.workers.Wait()
}

func (w *sampler) record(one sample, body string) {
	var answer struct {
		Token  string `json:"access_token"`
		Reason string
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		answer.Reason = body
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if one.reason = answer.Reason; one.status == http.StatusOK {
		claims, known := w.claims[answer.Token]
		if !known {
			var err error
			if claims, err = fakeAzure.Verify(answer.Token); err != nil {
				w.t.Errorf("%s received an invalid token: %v", w.pod, err)
			}
			w.claims[answer.Token] = claims
		}
		one.app, one.token = claims.AppID, claims.TokenID
	}
	w.samples = append(w.samples, one)
}

// since returns the samples whose request was sent at start or later.
func (w *sampler) since(start time.Time) []sample {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []sample
	for _, one := range w.samples {
		if !one.began.Before(start) {
			out = append(out, one)
		}
	}
	return out
}

// waitForSamples waits until kind returns true for n samples. It ignores samples that began before the call.
func (w *sampler) waitForSamples(n int, kind func(sample) bool) {
	w.t.Helper()
	start := time.Now()
	eventually(w.t, 60*time.Second, func() error {
		got, last := 0, sample{}
		for _, one := range w.since(start) {
			if last = one; kind(one) {
				got++
			}
		}
		if got < n {
			return fmt.Errorf("%s: %d of %d samples; the last is %+v", w.pod, got, n, last)
		}
		return nil
	})
}

// change is a change of objects in the API server. before reports whether a sample shows the state before the change,
// and after whether it shows the state after the change.
type change struct {
	what          string
	do            func() error // returns when the API server has acknowledged the change
	before, after func(sample) bool
}

// maxDelay is the longest time after a change during which requests may still have outcomes of the old state. On an
// idle computer, NMI needs some milliseconds. The limit is higher because the whole cluster and workers that never
// pause share a few CPUs. It is far below each interval at which NMI would notice a change without its watches.
const maxDelay = 5 * time.Second

// applyUnderLoad makes the change while the samplers run, and checks the outcomes of each sampler. Requests with an
// outcome of the old state must end at most maxDelay after the change. A request that begins after the first outcome of
// the new state must not have an outcome of the old state. No outcome may be of any other state.
func applyUnderLoad(t *testing.T, samplers []*sampler, c change) {
	t.Helper()
	for _, w := range samplers {
		w.waitForSamples(20, c.before)
	}
	began := time.Now()
	must(t, c.do())
	acknowledged := time.Now()
	for _, w := range samplers {
		w.waitForSamples(200, c.after)
	}
	for _, w := range samplers {
		samples := w.since(began)
		// first is the earliest end of a sample of the new state. lastBegan and lastEnded are the latest start and the
		// latest end of the samples of the old state.
		var first, lastBegan, lastEnded time.Time
		for _, one := range samples {
			if c.after(one) && (first.IsZero() || one.ended.Before(first)) {
				first = one.ended
			}
		}
		others := map[string]int{}
		for _, one := range samples {
			switch {
			case c.before(one):
				if one.began.After(lastBegan) {
					lastBegan = one.began
				}
				if one.ended.After(lastEnded) {
					lastEnded = one.ended
				}
				if one.began.After(first) {
					t.Errorf("%s, %s: a request that began %s after the first outcome of the new state has an outcome of the old state: %+v", c.what, w.pod, one.began.Sub(first), one)
				}
			case !c.after(one):
				others[fmt.Sprintf("%d %s %s", one.status, one.reason, one.app)]++
			}
		}
		if len(others) > 0 {
			t.Errorf("%s, %s: outcomes of neither state: %v", c.what, w.pod, others)
		}
		if late := lastBegan.Sub(acknowledged); late > maxDelay {
			t.Errorf("%s, %s: the old state still applied to a request that began %s after the change", c.what, w.pod, late)
		}
		if late := lastEnded.Sub(acknowledged); late > maxDelay {
			t.Errorf("%s, %s: the old state still applied to a request that ended %s after the change", c.what, w.pod, late)
		}
		t.Logf("%s, %s: after the API server's acknowledgement: first outcome of the new state %s, last request with an outcome of the old state began %s and ended %s",
			c.what, w.pod, delay(acknowledged, first), delay(acknowledged, lastBegan), delay(acknowledged, lastEnded))
	}
}

// delay returns the difference to - from as text, or "at once" if to is not later than from. The callers pass as from
// the time when the API server acknowledged a change. to can be earlier, because a change can take effect before its
// acknowledgement arrives. to is zero if no sample had an outcome of the old state.
func delay(from, to time.Time) string {
	if !to.After(from) {
		return "at once"
	}
	return to.Sub(from).Round(100 * time.Microsecond).String()
}

// objectClient changes objects of the namespace.
type objectClient struct{ s *testNamespace }

func (c objectClient) server() rest.Interface { return clientset.CoreV1().RESTClient() }

func (c objectClient) path(kind, name string) string {
	if kind == secrets {
		return "/api/v1/namespaces/" + c.s.name + "/secrets/" + name
	}
	return "/apis/aadpodidentity.k8s.io/v1/namespaces/" + c.s.name + "/" + kind + "/" + name
}

const secrets, identities, bindings = "secrets", "azureidentities", "azureidentitybindings"

func (c objectClient) patch(kind, name, body string) func() error {
	return func() error {
		return c.server().Patch(types.MergePatchType).AbsPath(c.path(kind, name)).Body([]byte(body)).Do(c.s.t.Context()).Error()
	}
}

func (c objectClient) delete(kind, name string) func() error {
	return func() error { return c.server().Delete().AbsPath(c.path(kind, name)).Do(c.s.t.Context()).Error() }
}

func TestAChangeTakesEffectImmediatelyAndForAllPodsUnderLoad(t *testing.T) {
	s := newNamespace(t)
	first, second := newApp(t, withSecret("old")), newApp(t, withSecret("new"))
	objects := objectClient{s}
	// The test deletes these objects, and creates them again from the manifests.
	secret := s.secretYAML("app", map[string][]byte{"clientSecret": []byte("new")})
	bound := s.boundYAML("app", "app", bySecretSpec(1, second, "app"))
	again := func(yaml string) func() error { return func() error { return applyYAML(t.Context(), yaml) } }

	s.apply(strings.Replace(secret, `"bmV3"`, `"b2xk"`, 1) + s.boundYAML("app", "app", bySecretSpec(1, first, "app")) +
		s.podYAML("on1", "app", "node1", "pause") + s.podYAML("on2", "app", "node2", "pause"))
	s.waitForPods()
	samplers := []*sampler{s.startSampler("on1"), s.startSampler("on2")}
	of := func(id azure.Identity) func(sample) bool {
		return func(one sample) bool { return one.status == 200 && one.app == id.ClientID }
	}
	refused := func(status int, reason string) func(sample) bool {
		return func(one sample) bool { return one.status == status && one.reason == reason }
	}

	// From here, Entra ID accepts only the new secret, while the Secret in Kubernetes still has the old one. Pods still
	// get cached tokens. Requests for other tokens fail.
	for _, w := range samplers {
		w.waitForSamples(20, of(first))
	}
	must(t, fakeAzure.AddApp(t.Context(), azure.App{ClientID: first.ClientID, ObjectID: first.ObjectID, Secrets: []azure.AppSecret{{Value: "new"}}}))
	const elsewhere = "https://elsewhere.example"
	s.mustBeRefused(s.ask("on1", elsewhere), 403, "upstream_refused")
	var old []string
	for _, w := range samplers {
		for _, one := range w.since(time.Time{}) {
			if !slices.Contains(old, one.token) {
				old = append(old, one.token)
			}
		}
	}
	ofOld := func(one sample) bool { return one.status == 200 && slices.Contains(old, one.token) }
	applyUnderLoad(t, samplers, change{"Secret rotated", objects.patch(secrets, "app", `{"data":{"clientSecret":"bmV3"}}`), ofOld,
		func(one sample) bool { return of(first)(one) && !ofOld(one) }})
	rotated := time.Now()
	// NMI must not use the refusal that it cached for the old secret.
	s.mustHaveTokenOf(s.ask("on1", elsewhere), first, elsewhere)

	for _, c := range []change{
		{"clientID changed", objects.patch(identities, "app", `{"spec":{"clientID":"`+second.ClientID+`"}}`), of(first), of(second)},
		{"Secret removed", objects.delete(secrets, "app"), of(second), refused(403, "secret_missing")},
		{"Secret created again", again(secret), refused(403, "secret_missing"), of(second)},
		{"binding removed", objects.delete(bindings, "app-binding"), of(second), refused(400, "no_matching_binding")},
		{"binding created again", again(bound), refused(400, "no_matching_binding"), of(second)},
		{"identity removed", objects.delete(identities, "app"), of(second), refused(400, "identity_missing")},
		{"identity created again", again(bound), refused(400, "identity_missing"), of(second)},
	} {
		applyUnderLoad(t, samplers, c)
	}
	checkNoOldToken(t, samplers, rotated, ofOld)
}

// checkNoOldToken stops the samplers and checks that no request after the rotation of the Secret got a token from
// before the rotation.
func checkNoOldToken(t *testing.T, samplers []*sampler, rotated time.Time, ofOld func(sample) bool) {
	t.Helper()
	for _, w := range samplers {
		w.stop()
		samples := w.since(time.Time{})
		for _, one := range w.since(rotated) {
			if ofOld(one) {
				t.Errorf("%s: a request that began after the rotation of the Secret got a token from before the rotation: %+v", w.pod, one)
				break
			}
		}
		t.Logf("%s: %d samples, %d different tokens", w.pod, len(samples), len(w.claims))
	}
}

// While a request waits for its token, the objects that allow the request can change. NMI must respond as the changed
// objects require.
func TestAChangeDuringAFetchAppliesToItsAnswer(t *testing.T) {
	s := newNamespace(t)
	first, second := newApp(t, withSecret("hush")), newApp(t, withSecret("hush"))
	objects := objectClient{s}
	secret, bound := s.secretYAML("app", map[string][]byte{"clientSecret": []byte("hush")}), s.boundYAML("app", "app", bySecretSpec(1, first, "app"))
	s.apply(secret + bound)
	s.pod("p", "app", "node1")
	s.mustHaveTokenOf(s.ask("p", vault), first, vault)
	client := s.podClient("p", true)
	setFaults(t, map[string]string{"entra.latency": "800ms", "entra.faults-on": "token"})
	for i, c := range []struct {
		what   string
		do     func() error
		status int
		want   string // text that the answer must contain: a reason, or a client ID
	}{
		{"clientID changed", objects.patch(identities, "app", `{"spec":{"clientID":"`+second.ClientID+`"}}`), 200, second.ClientID},
		{"Secret removed", objects.delete(secrets, "app"), 403, "secret_missing"},
		{"binding removed", objects.delete(bindings, "app-binding"), 400, "no_matching_binding"},
		{"identity removed", objects.delete(identities, "app"), 400, "identity_missing"},
	} {
		stats, err := fakeAzure.Stats(t.Context())
		must(t, err)
		type response struct {
			status int
			body   string
		}
		answered := make(chan response, 1)
		go func() {
			// Each case requests a token for another resource, so that NMI has none in its cache.
			status, body := get(context.Background(), client, fmt.Sprintf("%s/%d", askVault, i))
			answered <- response{status, body}
		}()
		eventually(t, 20*time.Second, func() error {
			if now, err := fakeAzure.Stats(t.Context()); err != nil || now.Entra.Token.Requests == stats.Entra.Token.Requests {
				return fmt.Errorf("%s: Entra ID received no request (%v)", c.what, err)
			}
			return nil
		})
		must(t, c.do())
		if got := <-answered; got.status != c.status || !strings.Contains(got.body, c.want) {
			t.Errorf("%s while the token was fetched: %d %s", c.what, got.status, got.body)
		}
		s.apply(secret + bound)
		eventually(t, 20*time.Second, func() error {
			if status, body := get(t.Context(), client, askVault); status != 200 || !strings.Contains(body, first.ClientID) {
				return fmt.Errorf("after %s: %d %s", c.what, status, body)
			}
			return nil
		})
	}
}
