package outbound

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestAGateStaysClosedForTheLongestRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g RetryAfterGate
		if g.Remaining() > 0 {
			t.Error("a new gate is closed")
		}
		g.Extend(time.Minute)
		g.Extend(time.Second)
		time.Sleep(59 * time.Second)
		if left := g.Remaining(); left != time.Second {
			t.Errorf("the gate is closed for another %s, want 1s", left)
		}
		time.Sleep(time.Second)
		if g.Remaining() > 0 {
			t.Error("the gate is still closed after the longest Retry-After")
		}
	})
}

func TestARequestsOwnBodyIsNotThatOfTheNextAttempt(t *testing.T) {
	shared := strings.NewReader("all of it")
	r, err := http.NewRequest(http.MethodPost, "http://x/", io.NopCloser(shared))
	if err != nil {
		t.Fatal(err)
	}
	own, err := WithOwnBody(r)
	if err != nil {
		t.Fatal(err)
	}
	shared.Reset("rewound")
	got, err := io.ReadAll(own.Body)
	if err != nil || string(got) != "all of it" || own.ContentLength != int64(len(got)) || own.GetBody != nil {
		t.Errorf("the body of the copy is %q (%v), its ContentLength %d; want the text from before the rewind, and no GetBody", got, err, own.ContentLength)
	}
	r.Body = http.NoBody
	if same, err := WithOwnBody(r); err != nil || same != r {
		t.Errorf("a request without a body became %v, %v", same, err)
	}
}

func TestABundleThatHoldsNoCertificateIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ca.pem")
	if _, err := RootCAs(file); err == nil || !strings.Contains(err.Error(), "reading --ca-bundle") {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(file, []byte("none"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := RootCAs(file); err == nil || !strings.Contains(err.Error(), "holds no certificate") {
		t.Errorf("no certificate: %v", err)
	}
	if pool, err := RootCAs(""); pool != nil || err != nil {
		t.Errorf("no bundle: %v, %v", pool, err)
	}
}
