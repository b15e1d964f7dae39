package credentials

import (
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/token"
)

var passwordRef = token.Ref{Namespace: "ns", Name: "password"}

func mustContent(t *testing.T, s *Secrets, pod, want string) token.SecretContent {
	t.Helper()
	got, err := s.forPod(t.Context(), passwordRef, pod)
	if err != nil || string(got.Data["clientSecret"]) != want {
		t.Fatalf("got %q, %v; want %q", got.Data["clientSecret"], err, want)
	}
	return got
}

func TestASecretIsWatchedWhileAPodUsesIt(t *testing.T) {
	c := nmitest.NewKubernetes(t)
	s := newSecrets(t, c)
	first := mustContent(t, s, "1", "first")
	if again := mustContent(t, s, "2", "first"); again.Revision != first.Revision || c.Watches != 1 {
		t.Errorf("two pods that use the same Secret caused %d watches, or got different revisions", c.Watches)
	}
	c.Secrets.Modify(nmitest.Secret("second"))
	if gone := <-c.Changed; gone != first.Revision {
		t.Errorf("after a change of the Secret, revision %s is reported as replaced; want %s", gone, first.Revision)
	}
	second := mustContent(t, s, "1", "second")
	if second.Revision == first.Revision {
		t.Error("the changed Secret has the revision of its former content")
	}
	s.release("1")
	mustContent(t, s, "2", "second")
	if c.Watches != 1 {
		t.Errorf("the release of one of two pods started the watch again: %d watches", c.Watches)
	}
	s.release("2")
	if gone := <-c.Changed; gone != second.Revision || len(s.watched) != 0 || len(s.secretsOfPod) != 0 {
		t.Errorf("after the release of the last pod: %d Secrets are watched for %d pods, and revision %s is reported as unused", len(s.watched), len(s.secretsOfPod), gone)
	}
	if got, err := s.Secret(t.Context(), passwordRef); err != nil || string(got.Data["clientSecret"]) != "read" || len(s.watched) != 0 {
		t.Errorf("a read without a pod returned %v, and %d Secrets are watched; want none", err, len(s.watched))
	}
}

func TestADeletedSecretIsMissingAtOnce(t *testing.T) {
	c := nmitest.NewKubernetes(t)
	s := newSecrets(t, c)
	first := mustContent(t, s, "1", "first")
	c.Secrets.Delete(nmitest.Secret("first"))
	if gone := <-c.Changed; gone != first.Revision {
		t.Errorf("after the deletion of the Secret, revision %s is reported, which is not that of the Secret", gone)
	}
	var e *token.Error
	if _, err := s.forPod(t.Context(), passwordRef, "1"); !errors.As(err, &e) || e.Reason != identity.SecretMissing || !strings.Contains(e.Detail, "ns/password") {
		t.Errorf("for a deleted Secret: got %v", err)
	}
}

func TestAForbiddenSecretIsWatchedAgainAfterAWhile(t *testing.T) {
	c := nmitest.NewKubernetes(t)
	c.Forbidden = true
	s := newSecrets(t, c)
	var e *token.Error
	for range 20 {
		if _, err := s.forPod(t.Context(), passwordRef, "1"); !errors.As(err, &e) || e.Reason != identity.SecretUnreadable || e.Class != token.Denied || !strings.Contains(e.Detail, "nmi.secretNamespaces") {
			t.Fatalf("for a Secret that NMI may not read: got %v", err)
		}
	}
	if c.Watches != 1 {
		t.Errorf("20 requests for a forbidden Secret started %d watches, want one", c.Watches)
	}
	c.Mu.Lock()
	c.Forbidden = false
	c.Mu.Unlock()
	s.mu.Lock()
	s.watched[passwordRef].retryAfter = time.Now().Add(-time.Second)
	s.mu.Unlock()
	mustContent(t, s, "1", "first")
}

func TestOnePodCannotCauseUnlimitedWatches(t *testing.T) {
	c := nmitest.NewKubernetes(t)
	s := newSecrets(t, c)
	for i := range maxSecretsPerPod {
		if _, err := s.watch(token.Ref{Namespace: "ns", Name: strings.Repeat("x", i+1)}, "1"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.forPod(t.Context(), passwordRef, "1"); !errors.Is(err, token.ErrPodThrottled) {
		t.Errorf("for one Secret more than maxSecretsPerPod: got %v, want ErrPodThrottled", err)
	}
	mustContent(t, s, "2", "first")
}

func TestDifferentContentsHaveDifferentRevisions(t *testing.T) {
	seen := map[string]bool{}
	for _, data := range []map[string][]byte{{}, {"a": {}}, {"a": []byte("b")}, {"ab": {}}, {"a": {}, "b": {}}, {"": []byte("ab")}} {
		seen[contentOf(&corev1.Secret{Data: data}).Revision] = true
	}
	if len(seen) != 6 {
		t.Errorf("6 contents have %d revisions", len(seen))
	}
}

func newSecrets(t *testing.T, c *nmitest.Kubernetes) *Secrets {
	return NewSecrets(t.Context(), c, c.OnSecretChange)
}
