package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

func TestTheRefusalOfAnUntrustedPodNamesTheMissingFederatedCredential(t *testing.T) {
	independent(t)
	s, app := newNamespace(t), newApp(t, func(*azure.App) {})
	trust(t, app, s.name, "trusted")
	for _, account := range []string{"trusted", "untrusted", "late"} {
		s.apply(fmt.Sprintf("{apiVersion: v1, kind: ServiceAccount, metadata: {namespace: %s, name: %s}}", s.name, account) +
			asAccount(account, s.podYAML(account, "app", "node2", "pause")))
	}
	s.apply(s.boundYAML("app", "app", federatedSpec(app)))
	s.waitForPods()
	s.mustHaveTokenOf(s.ask("trusted", vault), app, vault)
	refused := s.ask("untrusted", vault) // while the token of pod "trusted" is cached
	s.mustBeRefused(refused, 403, "federation_untrusted")
	for _, want := range []string{clusterIssuer(t), "system:serviceaccount:" + s.name + ":untrusted", exchangeAudience} {
		if !strings.Contains(refused.body["detail"], want) {
			t.Errorf("the field detail lacks %s: %s", want, refused.raw)
		}
	}
	if !strings.Contains(refused.body["error_description"], "AADSTS70021") {
		t.Errorf("error_description lacks the error of Entra ID, AADSTS70021: %s", refused.raw)
	}
	eventually(t, 30*time.Second, func() error {
		if e := s.refusalEvents()["untrusted"]; len(e) != 1 || !strings.Contains(e[0].Message, "federation_untrusted") {
			return fmt.Errorf("the Events of pod untrusted are %+v; want one with the reason federation_untrusted", e)
		}
		return nil
	})
}

// It can take minutes until all servers of Entra ID know a new federated credential. Therefore NMI retries while the
// pod's request waits.
func TestARequestWaitsForANewFederatedCredential(t *testing.T) {
	s, app := newNamespace(t), newApp(t, func(*azure.App) {})
	s.apply(s.boundYAML("app", "app", federatedSpec(app)))
	must(t, fakeAzure.ResetLog(t.Context()))
	s.apply(s.podYAML("p", "app", "node1", "token", "--resource", vault))
	eventually(t, 60*time.Second, func() error {
		if stats, err := fakeAzure.Stats(t.Context()); err != nil || stats.Entra.ByStatus[401] == 0 {
			return fmt.Errorf("Entra ID has refused no request yet (%v)", err)
		}
		return nil
	})
	trust(t, app, s.name, "default")
	var got outcome
	eventually(t, 30*time.Second, func() error {
		out, err := podOutput(t.Context(), s.name, "p", corev1.PodLogOptions{})
		if err != nil {
			return err
		}
		return json.Unmarshal([]byte(out), &got)
	})
	a := answer{status: got.Status, raw: got.Body, body: map[string]string{}}
	must(t, json.Unmarshal([]byte(got.Body), &a.body))
	s.mustHaveTokenOf(a, app, vault)
	t.Logf("the request took %.1f s", got.DurationMS/1000)
}

func TestNMIsServiceAccountCanCreateNoOtherTokens(t *testing.T) {
	independent(t)
	s := newNamespace(t)
	s.pod("p", "x", "node1")
	pod := authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: "p", UID: getPod(t, s.name, "p").UID}
	podWithoutUID, secret := pod, authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Secret", Name: "s"}
	podWithoutUID.UID = "" // the token would be valid for any pod of this name
	s.apply(s.secretYAML("s", map[string][]byte{}))
	nmi, administrator := clientsetAs(t, "system:serviceaccount:"+cluster.ChartNamespace+":"+nmiPodOn(t, "node1").Spec.ServiceAccountName), clientset
	const apiServer = "https://kubernetes.default.svc.cluster.local"
	for _, c := range []struct {
		boundTo   *authenticationv1.BoundObjectReference
		audiences []string
		seconds   int64 // 0: the default, an hour
		refused   bool
	}{
		{&pod, []string{exchangeAudience}, 600, false},
		{&pod, []string{apiServer}, 600, true},
		{&pod, []string{exchangeAudience, "other"}, 600, true},
		{&pod, nil, 600, true}, // the default audience: the API server
		{&pod, []string{exchangeAudience}, 601, true},
		{&pod, []string{exchangeAudience}, 86400, true},
		{&pod, []string{exchangeAudience}, 0, true},
		{nil, []string{exchangeAudience}, 600, true},
		{&podWithoutUID, []string{exchangeAudience}, 600, true},
		{&secret, []string{exchangeAudience}, 600, true},
	} {
		request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: c.boundTo, Audiences: c.audiences}}
		if c.seconds != 0 {
			request.Spec.ExpirationSeconds = &c.seconds
		}
		create := func(as kubernetes.Interface) error {
			_, err := as.CoreV1().ServiceAccounts(s.name).CreateToken(t.Context(), "default", request.DeepCopy(), metav1.CreateOptions{})
			return err
		}
		if err := create(nmi); (err != nil) != c.refused || err != nil && !strings.Contains(err.Error(), "ValidatingAdmissionPolicy") {
			t.Errorf("the API server wrongly accepts or refuses a token request of NMI with %+v: error %v", request.Spec, err)
		}
		// The policy restricts only NMI.
		if err := create(administrator); err != nil {
			t.Errorf("the API server refuses a token request of the administrator with %+v: %v", request.Spec, err)
		}
	}
}

func TestWhileEntraIDFailsPodsAreServedFromTheCache(t *testing.T) {
	s, id := newNamespace(t), newApp(t, withSecret("hush"))
	s.apply(s.secretYAML("app", map[string][]byte{"clientSecret": []byte("hush")}) + s.boundYAML("app", "app", bySecretSpec(1, id, "app")) +
		s.podYAML("served", "app", "node1", "pause") + s.podYAML("new", "app", "node1", "pause"))
	s.waitForPods()
	s.mustHaveTokenOf(s.ask("served", vault), id, vault)
	l := s.startLoad("served", 1, 10*time.Millisecond)
	must(t, fakeAzure.ResetLog(t.Context()))
	start, requests := time.Now(), 0
	var last string
	for i, one := range []struct {
		switches map[string]string
		lasts    time.Duration
	}{{map[string]string{"entra.status": "503"}, 5 * time.Second}, {map[string]string{"entra.drop": "true"}, 5 * time.Second},
		{map[string]string{"entra.hang": "true"}, time.Second}} { // one request: it takes longer than 1 s
		setFaults(t, one.switches)
		last = fmt.Sprintf("https://uncached%d.example", i)
		for from := time.Now(); time.Since(from) < one.lasts; requests++ {
			a := s.ask("new", last)
			s.mustBeRefused(a, 503, "upstream_unavailable")
			if !strings.Contains(a.headers, "Retry-After: ") || a.body["error"] != "service_unavailable" {
				t.Errorf("%v: the client receives %s %s", one.switches, a.headers, a.raw)
			}
		}
	}
	took := time.Since(start)
	stats, err := fakeAzure.Stats(t.Context())
	must(t, err)
	must(t, fakeAzure.Set(t.Context(), map[string]string{"reset": "all"}))
	s.mustHaveTokenOf(s.ask("new", "https://next.example"), id, "https://next.example")
	eventually(t, 20*time.Second, func() error { // NMI caches the last failure for 2 s
		if a := s.ask("new", last); a.status != 200 {
			return fmt.Errorf("got %d %s", a.status, a.raw)
		}
		return nil
	})
	l.stop()
	if e := s.refusalEvents()["new"]; len(e) > 3 {
		t.Errorf("three causes of refusals led to %d Events of pod new; want at most 3: %+v", len(e), e)
	}
	t.Logf("Entra ID failed for %.0f s: %d requests of a pod led to %d token requests and %d other requests to it; load: %s",
		took.Seconds(), requests, stats.Entra.Token.Requests, stats.Entra.All.Requests-stats.Entra.Token.Requests, l)
	// NMI makes at most three attempts before it reports a failure, and then caches the failure for 2 s. That is at
	// most 1.5 attempts per second for one resource. The limit is twice as high.
	if limit := 3 * (int(took.Seconds()) + 1); stats.Entra.All.Requests > limit {
		t.Errorf("Entra ID received %d requests in %.0f s; want at most %d", stats.Entra.All.Requests, took.Seconds(), limit)
	}
	if tokens := l.statuses[200]; len(l.statuses) != 1 || tokens == 0 {
		t.Errorf("the failure affected a pod whose token was cached: %s", l)
	}
}

func TestThrottlingByEntraIDIsPassedOn(t *testing.T) {
	s, id := newNamespace(t), newApp(t, withSecret("hush"))
	s.apply(s.secretYAML("app", map[string][]byte{"clientSecret": []byte("hush")}) + s.boundYAML("app", "app", bySecretSpec(1, id, "app")))
	s.pod("p", "app", "node2")
	s.mustHaveTokenOf(s.ask("p", vault), id, vault)
	setFaults(t, map[string]string{"entra.throttle": "-1", "entra.retry-after": "9"})
	s.mustHaveTokenOf(s.ask("p", vault, "bypass_cache=true"), id, vault)
	refused := s.ask("p", "https://storage.azure.com/")
	s.mustBeRefused(refused, 429, "upstream_throttled")
	if !strings.Contains(refused.headers, "Retry-After: ") {
		t.Errorf("the answer has no Retry-After: %s", refused.headers)
	}
	stats, err := fakeAzure.Stats(t.Context())
	must(t, err)
	for range 5 {
		s.mustBeRefused(s.ask("p", "https://storage.azure.com/"), 429, "upstream_throttled")
	}
	if now, err := fakeAzure.Stats(t.Context()); err != nil || now.Entra.Token.Requests != stats.Entra.Token.Requests {
		t.Errorf("Entra ID received %d more requests although it asked to wait (%v)", now.Entra.Token.Requests-stats.Entra.Token.Requests, err)
	}
}

func TestTheAuditLogNamesPodTokenAndCorrelationID(t *testing.T) {
	independent(t)
	s, id := newNamespace(t), newApp(t, withSecret("hush"))
	managed := newIdentity(t)
	s.apply(s.secretYAML("app", map[string][]byte{"clientSecret": []byte("hush")}) + s.boundYAML("app", "app", bySecretSpec(1, id, "app")))
	s.bind("managed", "managed", managed)
	s.apply(s.podYAML("p", "app", "node1", "pause") + s.podYAML("m", "managed", "node1", "pause") + s.podYAML("none", "none", "node1", "pause"))
	s.waitForPods()
	first, again, other := s.ask("p", vault), s.ask("p", vault), s.ask("m", vault)
	s.mustHaveTokenOf(first, id, vault)
	s.mustHaveTokenOf(again, id, vault)
	s.mustHaveTokenOf(other, managed, vault)
	s.mustBeRefused(s.ask("none", vault), 400, "no_matching_binding")
	refused := s.ask("p", "https://nothing.invalid")
	s.mustBeRefused(refused, 400, "upstream_refused")
	uid := string(getPod(t, s.name, "p").UID)
	claims, err := fakeAzure.Verify(first.token())
	must(t, err)
	otherClaims, err := fakeAzure.Verify(other.token())
	must(t, err)
	entries, err := fakeAzure.Log(t.Context(), 0)
	must(t, err)
	correlation := ""
	for _, e := range entries {
		if e.TokenID == claims.TokenID {
			correlation = e.CorrelationID
		}
	}
	_, trail, _ := strings.Cut(refused.body["error_description"], "Correlation ID: ")
	wants := []logLine{
		{Pod: "p", Identity: s.name + "/app", Resource: vault, Reason: "allowed", Cache: "fetched", Status: 200, CorrelationID: correlation, TokenID: claims.TokenID},
		{Pod: "p", Identity: s.name + "/app", Resource: vault, Reason: "allowed", Cache: "hit", Status: 200, CorrelationID: correlation, TokenID: claims.TokenID},
		{Pod: "m", Identity: s.name + "/managed", Resource: vault, Reason: "allowed", Cache: "fetched", Status: 200, TokenID: otherClaims.TokenID},
		{Pod: "none", Resource: vault, Reason: "no_matching_binding", Status: 400},
		{Pod: "p", Identity: s.name + "/app", Resource: "https://nothing.invalid", Reason: "upstream_refused", Status: 400, Cache: "fetched", CorrelationID: trail[:min(len(trail), 36)]},
	}
	if len(trail) < 36 || correlation == "" {
		t.Fatalf("no correlation ID: %q in the log of Entra ID, answer %s", correlation, refused.raw)
	}
	eventually(t, 30*time.Second, func() error {
		lines := s.lines("node1")
		if len(lines) != len(wants) {
			return fmt.Errorf("%d lines for %d requests: %+v", len(lines), len(wants), lines)
		}
		for i, want := range wants {
			got := lines[i]
			if got.Logger != "audit" || got.PodUID == "" || got.Pod == "p" && got.PodUID != uid || !strings.HasSuffix(got.ServiceAccount, "default") || got.DurationMS <= 0 {
				return fmt.Errorf("line %d: %s", i, got.raw)
			}
			want.Logger, want.PodNamespace, want.PodUID, want.ServiceAccount = got.Logger, s.name, got.PodUID, got.ServiceAccount
			want.Detail, want.DurationMS, want.raw, want.Verified = got.Detail, got.DurationMS, got.raw, "cgroup"
			if got != want {
				text, _ := json.Marshal(want)
				return fmt.Errorf("line %d: %s; want %s", i, got.raw, text)
			}
		}
		return nil
	})
}
