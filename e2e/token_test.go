package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// outcome is the JSON line that podclient writes to its log.
type outcome struct {
	Status     int
	Body       string
	Error      string
	DurationMS float64 `json:"duration_ms"`
}

func TestTwentyPodsThatRequestATokenInTheirFirstMillisecondAllGetOne(t *testing.T) {
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	must(t, fakeAzure.ResetLog(t.Context()))
	yaml := ""
	for i := range 20 {
		yaml += s.podYAML(fmt.Sprintf("p%02d", i), "app", testCluster.Nodes()[i%2], "token", "--resource", vault)
	}
	s.apply(yaml)
	var slowest float64
	for i := range 20 {
		name := fmt.Sprintf("p%02d", i)
		var got outcome
		eventually(t, 90*time.Second, func() error {
			out, err := podOutput(t.Context(), s.name, name, corev1.PodLogOptions{})
			if err != nil {
				return err
			}
			return json.Unmarshal([]byte(out), &got)
		})
		if got.Status != 200 {
			t.Errorf("%s: %+v", name, got)
			continue
		}
		a := answer{status: 200, raw: got.Body, body: map[string]string{}}
		must(t, json.Unmarshal([]byte(got.Body), &a.body))
		s.mustHaveTokenOf(a, id, vault)
		slowest = max(slowest, got.DurationMS)
	}
	t.Logf("the slowest first token of 20 pods took %.0f ms", slowest)
	checkNoPodReachedIMDS(t)
	if stats, err := fakeAzure.Stats(t.Context()); err != nil || stats.IMDS.Token.Requests > 2 {
		t.Errorf("20 pods with one identity on two nodes caused %d requests to IMDS (%v); want at most one per node", stats.IMDS.Token.Requests, err)
	}
}

func TestAPodGetsTheTokenOfItsBindingAndNoOther(t *testing.T) {
	independent(t)
	s, mine, others := newNamespace(t), newIdentity(t), newIdentity(t)
	elsewhere := newNamespace(t)
	s.bind("mine", "mine", mine)
	elsewhere.bind("others", "mine", others) // the same selector in another namespace
	s.pod("bound", "mine", "node1")
	s.apply(s.podYAML("unbound", "nothing", "node1", "pause") +
		strings.Replace(s.podYAML("unlabelled", "x", "node1", "pause"), `aadpodidbinding: "x"`, `app: "x"`, 1))
	s.waitForPods()

	s.mustHaveTokenOf(s.ask("bound", vault), mine, vault)
	s.mustHaveTokenOf(s.ask("bound", vault+"/"), mine, vault+"/") // another resource
	s.mustHaveTokenOf(s.ask("bound", vault, "bypass_cache=true"), mine, vault)
	s.mustBeRefused(s.ask("bound", vault, "client_id="+others.ClientID), 400, "identity_not_bound")

	refused := s.ask("unbound", vault)
	s.mustBeRefused(refused, 400, "no_matching_binding")
	if refused.body["error"] != "invalid_request" || refused.body["error_description"] != "Identity not found" || !strings.Contains(refused.body["detail"], "nothing") {
		t.Errorf("the refusal must have the error and the description of IMDS, and the label in detail; it is %s", refused.raw)
	}
	if a := s.ask("unlabelled", vault); a.reason() != "pod_not_labelled" {
		t.Errorf("got %d %s", a.status, a.raw)
	}
	s.mustBeRefused(s.ask("unbound", vault, "client_id="+mine.ClientID), 400, "no_matching_binding")
}

func TestEachSelectorChoosesBetweenTwoIdentities(t *testing.T) {
	independent(t)
	s, a, b := newNamespace(t), newIdentity(t), newIdentity(t)
	s.bind("a", "both", a)
	s.bind("b", "both", b)
	s.pod("p", "both", "node2")
	got := s.ask("p", vault)
	s.mustBeRefused(got, 400, "multiple_identities")
	if got.body["error_description"] != "Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request" {
		t.Errorf("the description differs from that of IMDS: %s", got.raw)
	}
	for _, id := range []struct {
		query string
		first bool
	}{
		{"client_id=" + strings.ToUpper(a.ClientID), true}, {"client_id=" + b.ClientID, false},
		{"object_id=" + a.ObjectID, true}, {"object_id=" + strings.ToUpper(b.ObjectID), false},
		{"msi_res_id=" + a.ResourceID, true}, {"mi_res_id=" + strings.ToUpper(b.ResourceID), false},
	} {
		want := b
		if id.first {
			want = a
		}
		s.mustHaveTokenOf(s.ask("p", vault, id.query), want, vault)
	}
	s.mustBeRefused(s.ask("p", vault, "client_id="+a.ClientID, "object_id="+a.ObjectID), 400, "request_malformed")
}

func TestAnExceptedPodGetsTheIdentitiesOfTheMachine(t *testing.T) {
	independent(t)
	s, id := newNamespace(t), newIdentity(t)
	s.pod("agent", "agent", "node1")
	s.mustBeRefused(s.ask("agent", vault, "client_id="+id.ClientID), 400, "no_matching_binding")
	s.apply(fmt.Sprintf(`{apiVersion: aadpodidentity.k8s.io/v1, kind: AzurePodIdentityException, metadata: {namespace: %s, name: agents}, spec: {podLabels: {aadpodidbinding: AGENT}}}`, s.name))
	eventually(t, 20*time.Second, func() error {
		if a := s.ask("agent", vault, "client_id="+id.ClientID); a.status != 200 {
			return fmt.Errorf("got %d %s", a.status, a.raw)
		}
		return nil
	})
	s.mustHaveTokenOf(s.ask("agent", vault, "client_id="+id.ClientID), id, vault)
	if a := s.ask("agent", vault); a.status != 200 {
		t.Errorf("a request without an identity got %d %s; want 200 and a token of the system-assigned identity", a.status, a.raw)
	}
}

func TestARevokedIdentityIsRefusedWithinOneWatchEvent(t *testing.T) {
	independent(t)
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	until := func(what string, refused bool) {
		t.Helper()
		start := time.Now()
		eventually(t, 10*time.Second, func() error {
			if a := s.ask("p", vault); (a.status != 200) != refused {
				return fmt.Errorf("got %d %s", a.status, a.raw)
			}
			return nil
		})
		t.Logf("%s: effective after %.0f ms, including curl", what, float64(time.Since(start).Milliseconds()))
	}
	s.label("p", "none")
	until("label changed", true)
	s.label("p", "app")
	until("label changed back", false)
	must(t, objectClient{s}.delete(bindings, "app-binding")())
	until("binding deleted", true)
}

func TestAnIdentityThatIsNotAttachedIsRefusedWithTheErrorOfIMDS(t *testing.T) {
	independent(t)
	s, id := newNamespace(t), newIdentity(t)
	must(t, fakeAzure.Detach(t.Context(), id.ClientID))
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	got := s.ask("p", vault)
	s.mustBeRefused(got, 400, "upstream_refused")
	if got.body["error_description"] != "Identity not found" || !strings.Contains(got.body["detail"], s.name+"/app") {
		t.Errorf("the refusal must have the description of IMDS, and the AzureIdentity in detail; it is %s", got.raw)
	}
	must(t, fakeAzure.AddIdentity(t.Context(), id))
	eventually(t, 30*time.Second, func() error { // NMI caches a failure for some seconds
		if a := s.ask("p", vault); a.status != 200 {
			return fmt.Errorf("got %d %s", a.status, a.raw)
		}
		return nil
	})
}

func TestExpiresInCountsDown(t *testing.T) {
	independent(t)
	s, id := newNamespace(t), newIdentity(t)
	s.bind("app", "app", id)
	s.pod("p", "app", "node1")
	first := s.ask("p", vault)
	eventually(t, 20*time.Second, func() error {
		later := s.ask("p", vault)
		if later.token() != first.token() {
			t.Fatal("the second answer has a different token")
		}
		var a, b int
		_, _ = fmt.Sscan(first.body["expires_in"], &a)
		_, _ = fmt.Sscan(later.body["expires_in"], &b)
		if b >= a || b < a-30 {
			return fmt.Errorf("expires_in went from %d to %d", a, b)
		}
		return nil
	})
}
