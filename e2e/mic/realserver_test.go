//go:build !race

package mic

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// The fake clock of a synctest bubble advances only while all goroutines of the bubble are durably blocked. A goroutine
// that waits for the network is not durably blocked, so an open connection inside the bubble would stop the clock.
// Therefore goroutines outside of the bubble talk to the real API server. A goroutine inside the bubble waits for a
// response on a channel from outside. This wait is not durable either, so a request takes no time of the fake clock. A
// goroutine that reads a watch must not stop the clock, so it polls for received data at intervals of the fake clock.
// The fake clock is limited to clockSpeed times the speed of real time. Otherwise much fake time would pass before an
// event of the API server arrives.
const (
	pollInterval = 20 * time.Millisecond // of the fake clock
	clockSpeed   = 40
)

// realServer is an API server with etcd and nothing else, in a network namespace of its own.
type realServer struct {
	config    *rest.Config
	host      *url.URL
	transport http.RoundTripper
	exchanges chan *exchange
	ticks     chan struct{} // one for each pollInterval of the fake clock
	stopped   chan struct{}
}

func startRealServer(t *testing.T) *realServer {
	dir, err := cluster.Scratch("micsim")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	plane, err := cluster.StartPlane(t.Context(), dir, func(line string) { t.Log(line) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := plane.Stop(); err != nil {
			t.Error(err)
		}
	})
	for _, args := range [][]string{
		{"apply", "--server-side", "-f", filepath.Join("..", "..", "deploy", "podidentity", "crds")},
		{"wait", "--for=condition=Established", "crd", "--all", "--timeout=30s"},
	} {
		if _, err := plane.Kubectl(t.Context(), args...); err != nil {
			t.Fatal(err)
		}
	}
	s := &realServer{exchanges: make(chan *exchange), ticks: make(chan struct{}), stopped: make(chan struct{})}
	if s.config, err = clientcmd.BuildConfigFromFlags("", plane.Kubeconfig()); err != nil {
		t.Fatal(err)
	}
	s.config.Dial, s.config.QPS = plane.DialContext, -1
	if s.transport, err = rest.TransportFor(s.config); err != nil {
		t.Fatal(err)
	}
	if s.host, err = url.Parse(s.config.Host); err != nil {
		t.Fatal(err)
	}
	go s.serveExchanges()
	go s.sendTicks()
	t.Cleanup(func() { close(s.stopped) })
	s.createNamespaces(t)
	return s
}

// serveExchanges offers exchanges to the goroutines of a bubble. It creates them outside of the bubble, because a
// channel that is created inside a bubble cannot be used outside.
func (s *realServer) serveExchanges() {
	for {
		e := &exchange{
			request: make(chan *http.Request, 1), response: make(chan exchangeResult, 1), aborted: make(chan struct{}),
			body: &realWatchBody{},
		}
		select {
		case s.exchanges <- e:
			go e.run(s.transport)
		case <-s.stopped:
			return
		}
	}
}

func (s *realServer) sendTicks() {
	ticker := time.NewTicker(pollInterval / clockSpeed)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-s.stopped:
			return
		}
		select {
		case s.ticks <- struct{}{}:
		case <-s.stopped:
			return
		}
	}
}

// limitClock runs inside a bubble until ctx ends, and limits the speed of its fake clock.
func (s *realServer) limitClock(ctx context.Context) {
	for pause(ctx, pollInterval) == nil {
		<-s.ticks // not durably blocked: the fake clock waits too
	}
}

// exchange is one request from inside a bubble and its response. Its method run runs outside of the bubble.
type exchange struct {
	request  chan *http.Request
	response chan exchangeResult
	aborted  chan struct{} // closed inside the bubble
	body     *realWatchBody
}

type exchangeResult struct {
	*http.Response
	err error
}

func (e *exchange) run(transport http.RoundTripper) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-e.aborted:
			cancel()
		case <-ctx.Done():
		}
	}()
	request := <-e.request
	response, err := transport.RoundTrip(request.WithContext(ctx))
	if err != nil {
		e.response <- exchangeResult{err: err}
		return
	}
	defer response.Body.Close()
	result := *response
	if request.URL.Query().Get("watch") == "" {
		data, err := io.ReadAll(response.Body)
		result.Body = io.NopCloser(bytes.NewReader(data))
		e.response <- exchangeResult{&result, err}
		return
	}
	result.Body = e.body
	e.response <- exchangeResult{&result, nil}
	e.body.fill(response.Body)
}

// handle sends a call to the API server, from inside a bubble.
func (s *realServer) handle(ctx context.Context, r *http.Request, c *call) (*http.Response, error) {
	u := *r.URL
	u.Scheme, u.Host = s.host.Scheme, s.host.Host
	request := &http.Request{Method: r.Method, URL: &u, Header: r.Header.Clone(), Host: s.host.Host}
	if len(c.body) > 0 {
		request.Body, request.ContentLength = io.NopCloser(bytes.NewReader(c.body)), int64(len(c.body))
	}
	e := <-s.exchanges
	e.request <- request
	abort := sync.OnceFunc(func() { close(e.aborted) })
	select {
	case result := <-e.response:
		if result.err != nil {
			return nil, result.err
		}
		if body, ok := result.Body.(*realWatchBody); ok {
			body.ctx, body.abort = ctx, abort
		}
		return result.Response, nil
	case <-ctx.Done():
		abort()
		return nil, ctx.Err()
	}
}

// realWatchBody is the body of a watch. fill runs outside of the bubble, Read and Close inside.
type realWatchBody struct {
	ctx   context.Context // of the bubble
	abort func()

	mu     sync.Mutex
	buffer bytes.Buffer
	err    error
}

func (b *realWatchBody) fill(from io.Reader) {
	data := make([]byte, 64<<10)
	for {
		n, err := from.Read(data)
		b.mu.Lock()
		b.buffer.Write(data[:n])
		b.err = err
		b.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (b *realWatchBody) Read(p []byte) (int, error) {
	for {
		b.mu.Lock()
		n, err := 0, b.err
		if b.buffer.Len() > 0 {
			n, err = b.buffer.Read(p)
		}
		b.mu.Unlock()
		if n > 0 || err != nil {
			return n, err
		}
		if err := pause(b.ctx, pollInterval); err != nil {
			return 0, err
		}
	}
}

func (b *realWatchBody) Close() error {
	b.abort()
	return nil
}

// createNamespaces creates the namespaces of the sequences. Each gets the ServiceAccount that the controller-manager
// would create: without it the API server rejects pods.
func (s *realServer) createNamespaces(t *testing.T) {
	client := kubernetes.NewForConfigOrDie(s.config).CoreV1()
	for _, name := range append([]string{micNamespace}, namespaces...) {
		if _, err := client.Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := client.ServiceAccounts(name).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

// reset deletes all objects of the previous sequence, also those with finalizers.
func (s *realServer) reset(t *testing.T) {
	client := s.client()
	lists := []string{"nodes", "namespaces/" + micNamespace + "/configmaps"}
	for _, namespace := range namespaces {
		for _, resource := range []string{"pods", "configmaps", v1.AzureAssignedIdentities, v1.AzureIdentities, v1.AzureIdentityBindings} {
			lists = append(lists, "namespaces/"+namespace+"/"+resource)
		}
	}
	for _, list := range lists {
		items, _ := client.send(http.MethodGet, list, "", nil).object["items"].([]any)
		for _, item := range items {
			metadata := item.(map[string]any)["metadata"].(map[string]any)
			path := fmt.Sprintf("%s/%s", list, metadata["name"])
			if metadata["finalizers"] != nil {
				client.send(http.MethodPatch, path, mergePatch, map[string]any{"metadata": map[string]any{"finalizers": nil}})
			}
			client.send(http.MethodDelete, path, "", map[string]any{"gracePeriodSeconds": 0})
			if r := client.send(http.MethodGet, path, "", nil); r.Code != http.StatusNotFound {
				t.Fatalf("%s still exists after its deletion: %s", path, r)
			}
		}
	}
}

// client returns a client for use outside of a bubble.
func (s *realServer) client() apiClient {
	return apiClient{roundTripper(func(r *http.Request) (*http.Response, error) {
		r.URL.Scheme, r.URL.Host, r.Host = s.host.Scheme, s.host.Host, s.host.Host
		return s.transport.RoundTrip(r)
	})}
}
