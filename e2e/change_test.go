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
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// sample is one answer that a pod got.
type sample struct {
	began, ended time.Time
	status       int
	reason       string // of a refusal
	app, token   string // appid and uti of the token
}

// watcher asks for a token in a pod without a pause and keeps what it got.
type watcher struct {
	t    *testing.T
	pod  string
	stop context.CancelFunc
	done sync.WaitGroup

	mu      sync.Mutex
	samples []sample
	known   map[string]azure.Claims // by token
}

const askVault = "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + vault

// client asks from the pod's network without help of the API server.
func (s *space) client(pod string, once bool) *http.Client {
	s.t.Helper()
	netns, err := world.PodNetns(s.t.Context(), s.name, pod)
	must(s.t, err)
	s.t.Cleanup(func() { netns.Close() })
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DialContext: cluster.DialFrom(fmt.Sprintf("/proc/self/fd/%d", netns.Fd()), nil), DisableKeepAlives: once}}
}

// watch starts two workers, one of which opens a connection for each request; for at most two minutes.
func (s *space) watch(pod string) *watcher {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	w := &watcher{t: s.t, pod: pod, stop: cancel, known: map[string]azure.Claims{}}
	for _, once := range []bool{true, false} {
		client := s.client(pod, once)
		w.done.Go(func() {
			for ctx.Err() == nil {
				one := sample{began: time.Now()}
				status, body := get(ctx, client, askVault)
				one.ended, one.status = time.Now(), status
				if ctx.Err() == nil {
					w.note(one, body)
				}
			}
		})
	}
	s.t.Cleanup(w.end)
	return w
}

func (w *watcher) end() {
	w.stop()
	w.done.Wait()
}

func (w *watcher) note(one sample, body string) {
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
		claims, known := w.known[answer.Token]
		if !known {
			var err error
			if claims, err = cloud.Verify(answer.Token); err != nil {
				w.t.Errorf("%s got %v", w.pod, err)
			}
			w.known[answer.Token] = claims
		}
		one.app, one.token = claims.AppID, claims.TokenID
	}
	w.samples = append(w.samples, one)
}

// since returns what was asked at that time or later.
func (w *watcher) since(start time.Time) []sample {
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

// count waits until n answers that were asked for from now on are of the kind.
func (w *watcher) count(n int, kind func(sample) bool) {
	w.t.Helper()
	start := time.Now()
	eventually(w.t, 15*time.Second, func() error {
		got, last := 0, sample{}
		for _, one := range w.since(start) {
			if last = one; kind(one) {
				got++
			}
		}
		if got < n {
			return fmt.Errorf("%s: %d of %d answers; the last was %+v", w.pod, got, n, last)
		}
		return nil
	})
}

// change is something that changes, and which answers tell before from after.
type change struct {
	what        string
	do          func() error // returns when the API server has acknowledged it
	before, now func(sample) bool
}

// limit is how long answers may still be of the state before a change. On a machine with nothing else to do it is some
// milliseconds; these have two CPUs for a whole cluster and workers that never rest.
const limit = 2 * time.Second

// follow makes the change under load and looks at how the pods' answers change with it.
func follow(t *testing.T, watchers []*watcher, c change) {
	t.Helper()
	for _, w := range watchers {
		w.count(20, c.before)
	}
	began := time.Now()
	must(t, c.do())
	acknowledged := time.Now()
	for _, w := range watchers {
		w.count(200, c.now)
	}
	for _, w := range watchers {
		samples := w.since(began)
		var first, lastBegan, lastEnded time.Time // of the state now; of the state before
		for _, one := range samples {
			if c.now(one) && (first.IsZero() || one.ended.Before(first)) {
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
					t.Errorf("%s, %s: %s after the first answer of the new state, one of the old was asked for: %+v", c.what, w.pod, one.began.Sub(first), one)
				}
			case !c.now(one):
				others[fmt.Sprintf("%d %s %s", one.status, one.reason, one.app)]++
			}
		}
		if len(others) > 0 {
			t.Errorf("%s, %s: answers of neither state: %v", c.what, w.pod, others)
		}
		if late := lastBegan.Sub(acknowledged); late > limit {
			t.Errorf("%s, %s: still in force for requests that began %s after the change", c.what, w.pod, late)
		}
		if late := lastEnded.Sub(acknowledged); late > limit {
			t.Errorf("%s, %s: still in force for answers that ended %s after the change", c.what, w.pod, late)
		}
		t.Logf("%s, %s: after the API server's acknowledgement the first answer of the new state came %s, the last of the old was asked for %s and came %s",
			c.what, w.pod, after(acknowledged, first), after(acknowledged, lastBegan), after(acknowledged, lastEnded))
	}
}

// after says how much later it was; before the acknowledgement came is sooner than can be told.
func after(from, to time.Time) string {
	if !to.After(from) {
		return "at once"
	}
	return to.Sub(from).Round(100 * time.Microsecond).String()
}

// api asks the API server without the time that it takes to start kubectl.
func api(t *testing.T) rest.Interface {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", world.Kubeconfig())
	must(t, err)
	config.Dial, config.QPS = world.DialContext, -1
	kube, err := kubernetes.NewForConfig(config)
	must(t, err)
	return kube.CoreV1().RESTClient()
}

// object is the path of an object at the API server.
func (s *space) object(kind, name string) string {
	if kind == secrets {
		return "/api/v1/namespaces/" + s.name + "/secrets/" + name
	}
	return "/apis/aadpodidentity.k8s.io/v1/namespaces/" + s.name + "/" + kind + "/" + name
}

const secrets, identities, bindings = "secrets", "azureidentities", "azureidentitybindings"

func (s *space) patch(server rest.Interface, kind, name, body string) func() error {
	return func() error {
		return server.Patch(types.MergePatchType).AbsPath(s.object(kind, name)).Body([]byte(body)).Do(s.t.Context()).Error()
	}
}

func (s *space) remove(server rest.Interface, kind, name string) func() error {
	return func() error { return server.Delete().AbsPath(s.object(kind, name)).Do(s.t.Context()).Error() }
}

func TestAChangeIsInForceAtOnceAndForAllAlsoUnderLoad(t *testing.T) {
	s := newSpace(t)
	first, second := newApp(t, withSecret("old")), newApp(t, withSecret("new"))
	server := api(t)
	// The whole of it again.
	secret := s.secretYAML("app", map[string][]byte{"clientSecret": []byte("new")})
	bound := s.boundYAML("app", "app", bySecretSpec(1, second, "app"))
	again := func(yaml string) func() error { return func() error { return world.Apply(t.Context(), yaml) } }

	s.apply(strings.Replace(secret, `"bmV3"`, `"b2xk"`, 1) + s.boundYAML("app", "app", bySecretSpec(1, first, "app")) +
		s.podYAML("on1", "app", "node1", "pause") + s.podYAML("on2", "app", "node2", "pause"))
	s.ready()
	watchers := []*watcher{s.watch("on1"), s.watch("on2")}
	of := func(id azure.Identity) func(sample) bool {
		return func(one sample) bool { return one.status == 200 && one.app == id.ClientID }
	}
	refused := func(status int, reason string) func(sample) bool {
		return func(one sample) bool { return one.status == status && one.reason == reason }
	}

	// Entra ID takes another secret before Kubernetes has it: what is in the cache goes on, what is not has to wait.
	for _, w := range watchers {
		w.count(20, of(first))
	}
	must(t, cloud.AddApp(t.Context(), azure.App{ClientID: first.ClientID, ObjectID: first.ObjectID, Secrets: []azure.AppSecret{{Value: "new"}}}))
	const elsewhere = "https://elsewhere.example"
	s.mustBeRefused(s.ask("on1", elsewhere), 403, "upstream_refused")
	var old []string
	for _, w := range watchers {
		for _, one := range w.since(time.Time{}) {
			if !slices.Contains(old, one.token) {
				old = append(old, one.token)
			}
		}
	}
	ofOld := func(one sample) bool { return one.status == 200 && slices.Contains(old, one.token) }
	follow(t, watchers, change{"Secret rotated", s.patch(server, secrets, "app", `{"data":{"clientSecret":"bmV3"}}`), ofOld,
		func(one sample) bool { return of(first)(one) && !ofOld(one) }})
	rotated := time.Now()
	s.mustHaveTokenOf(s.ask("on1", elsewhere), first, elsewhere) // the refusal was of the Secret that was

	for _, c := range []change{
		{"clientID changed", s.patch(server, identities, "app", `{"spec":{"clientID":"`+second.ClientID+`"}}`), of(first), of(second)},
		{"Secret removed", s.remove(server, secrets, "app"), of(second), refused(403, "secret_missing")},
		{"Secret made again", again(secret), refused(403, "secret_missing"), of(second)},
		{"binding removed", s.remove(server, bindings, "app-binding"), of(second), refused(400, "no_matching_binding")},
		{"binding made again", again(bound), refused(400, "no_matching_binding"), of(second)},
		{"identity removed", s.remove(server, identities, "app"), of(second), refused(400, "identity_missing")},
		{"identity made again", again(bound), refused(400, "identity_missing"), of(second)},
	} {
		follow(t, watchers, c)
	}
	for _, w := range watchers {
		w.end()
		samples := w.since(time.Time{})
		for _, one := range w.since(rotated) {
			if ofOld(one) {
				t.Errorf("%s: a token of before the rotation is back: %+v", w.pod, one)
				break
			}
		}
		t.Logf("%s: %d answers, %d different tokens", w.pod, len(samples), len(w.known))
	}
}

// What a request was granted for can change while it waits for the token.
func TestAChangeDuringAFetchIsInForceForItsAnswer(t *testing.T) {
	s := newSpace(t)
	first, second := newApp(t, withSecret("hush")), newApp(t, withSecret("hush"))
	server := api(t)
	secret, bound := s.secretYAML("app", map[string][]byte{"clientSecret": []byte("hush")}), s.boundYAML("app", "app", bySecretSpec(1, first, "app"))
	s.apply(secret + bound)
	s.pod("p", "app", "node1")
	s.mustHaveTokenOf(s.ask("p", vault), first, vault)
	client := s.client("p", true)
	fault(t, map[string]string{"entra.latency": "800ms", "entra.faults-on": "token"})
	for i, c := range []struct {
		what   string
		do     func() error
		status int
		says   string // in the answer: the reason, or the application
	}{
		{"clientID changed", s.patch(server, identities, "app", `{"spec":{"clientID":"`+second.ClientID+`"}}`), 200, second.ClientID},
		{"Secret removed", s.remove(server, secrets, "app"), 403, "secret_missing"},
		{"binding removed", s.remove(server, bindings, "app-binding"), 400, "no_matching_binding"},
		{"identity removed", s.remove(server, identities, "app"), 400, "identity_missing"},
	} {
		stats, err := cloud.Stats(t.Context())
		must(t, err)
		type response struct {
			status int
			body   string
		}
		answered := make(chan response, 1)
		go func() {
			status, body := get(context.Background(), client, fmt.Sprintf("%s/%d", askVault, i)) // a resource of its own
			answered <- response{status, body}
		}()
		eventually(t, 5*time.Second, func() error {
			if now, err := cloud.Stats(t.Context()); err != nil || now.Entra.Token.Requests == stats.Entra.Token.Requests {
				return fmt.Errorf("%s: Entra ID was not asked (%v)", c.what, err)
			}
			return nil
		})
		must(t, c.do())
		if got := <-answered; got.status != c.status || !strings.Contains(got.body, c.says) {
			t.Errorf("%s while the token was fetched: %d %s", c.what, got.status, got.body)
		}
		s.apply(secret + bound)
		eventually(t, 5*time.Second, func() error {
			if status, body := get(t.Context(), client, askVault); status != 200 || !strings.Contains(body, first.ClientID) {
				return fmt.Errorf("after %s: %d %s", c.what, status, body)
			}
			return nil
		})
	}
}
