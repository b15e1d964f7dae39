package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/podidentity/podidentity/e2e/cluster"
)

// load requests tokens from a pod's network namespace, each on a new connection, until stop.
type load struct {
	mu         sync.Mutex
	statuses   map[int]int // 0: no answer
	lastError  string      // of a request without an answer
	tokens     map[string]int
	lastToken  time.Time
	longestGap time.Duration // between two tokens, or from the start to the first token
	cancel     context.CancelFunc
	workers    sync.WaitGroup
}

// startLoad starts as many workers as workers says. Each worker pauses after each of its requests. All workers end
// after five minutes at the latest.
func (s *testNamespace) startLoad(pod string, workers int, pause time.Duration) *load {
	s.t.Helper()
	netns, err := testCluster.PodNetns(s.t.Context(), s.name, pod)
	must(s.t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	l := &load{statuses: map[int]int{}, tokens: map[string]int{}, lastToken: time.Now(), cancel: cancel}
	dial := cluster.DialFrom(fmt.Sprintf("/proc/self/fd/%d", netns.Fd()), nil)
	for range workers {
		client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: withoutTimeWait(dial), DisableKeepAlives: true}}
		l.workers.Go(func() {
			for ctx.Err() == nil {
				status, body := get(ctx, client, askVault)
				if ctx.Err() != nil {
					return
				}
				l.record(status, body)
				if status == 0 {
					time.Sleep(5 * time.Millisecond) // no busy loop while nothing listens
				}
				time.Sleep(pause)
			}
		})
	}
	s.t.Cleanup(func() { l.stop(); netns.Close() })
	return l
}

type dialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// withoutTimeWait returns a function that dials connections whose Close resets the connection. After an ordinary Close,
// the kernel keeps most ports in TIME_WAIT for a minute, and 500 connections a second use up all ports of a pod.
func withoutTimeWait(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		if err := conn.(*net.TCPConn).SetLinger(0); err != nil {
			conn.Close()
			return nil, err
		}
		return conn, nil
	}
}

func get(ctx context.Context, client *http.Client, url string) (int, string) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err.Error()
	}
	req.Header.Set("Metadata", "true")
	resp, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, string(body)
}

func (l *load) record(status int, body string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.statuses[status]++
	if status == 0 {
		l.lastError = body
	}
	if status == http.StatusOK {
		l.tokens[body]++
		l.longestGap = max(l.longestGap, time.Since(l.lastToken))
		l.lastToken = time.Now()
	}
}

func (l *load) stop() {
	l.cancel()
	l.workers.Wait()
}

// waitForTokens waits until the workers have received n more tokens.
func (l *load) waitForTokens(t *testing.T, n int, within time.Duration) {
	t.Helper()
	l.mu.Lock()
	from := l.statuses[200]
	l.mu.Unlock()
	eventually(t, within, func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		if got := l.statuses[200] - from; got < n {
			return fmt.Errorf("received %d of %d tokens; statuses so far: %v", got, n, l.statuses)
		}
		return nil
	})
}

func (l *load) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	text := fmt.Sprintf("statuses %v, longest time without a token %.2f s", l.statuses, l.longestGap.Seconds())
	if l.lastError != "" {
		text += ", last error: " + l.lastError
	}
	return text
}
