package server

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

func (b *bench) askHost(source, target, namespace, name string) (int, string) {
	r := httptest.NewRequest(http.MethodGet, target, nil)
	r.RemoteAddr = source + ":40000"
	r.Header.Set("podns", namespace)
	r.Header.Set("podname", name)
	w := httptest.NewRecorder()
	hostTokenHandler{b.Server}.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

func TestAProgramOfTheNodeGetsTokensForThePodThatItNames(t *testing.T) {
	b := newBench(t)
	status, body := b.askHost("127.0.0.1", "/host/token/?resource=https://vault.azure.net", "ns", "x")
	var answer struct {
		Token    map[string]string
		ClientID string
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || status != 200 {
		t.Fatalf("%d %s: %v", status, body, err)
	}
	if answer.ClientID != nmitest.ClientX || answer.Token["access_token"] != "token-of-"+nmitest.ClientX || answer.Token["resource"] != "https://vault.azure.net" || answer.Token["token_type"] != "Bearer" {
		t.Errorf("got %s", body)
	}
	for _, field := range []string{"expires_in", "expires_on", "not_before", "refresh_token"} {
		if _, ok := answer.Token[field]; !ok {
			t.Errorf("the token in the response has no field %s", field)
		}
	}
	if !strings.Contains(body, `"clientid":`) {
		t.Errorf("clients look for clientid: %s", body)
	}
	// For an identity of several tenants, the response has the token of the first tenant.
	if status, body := b.askHost("127.0.0.1", "/host/token?resource=r", "ns", "sp"); status != 200 || !strings.Contains(body, nmitest.ClientS) {
		t.Errorf("several tenants: %d %s", status, body)
	}
}

func TestTheHostTokenRouteRefusesRequests(t *testing.T) {
	b := newBench(t)
	for _, c := range []struct {
		name, source, target, namespace, pod string
		status                               int
		reason                               identity.Reason
	}{
		{"not bound", "127.0.0.1", "/host/token?resource=r", "ns", "none", 400, identity.PodNotLabelled},
		{"the identity of another pod", "127.0.0.1", "/host/token?resource=r&client_id=" + nmitest.ClientY, "ns", "x", 400, identity.IdentityNotBound},
		{"an unknown pod", "127.0.0.1", "/host/token?resource=r", "ns", "nobody", 503, identity.PodUnknown},
		{"no namespace", "127.0.0.1", "/host/token?resource=r", "", "x", 400, identity.RequestMalformed},
		{"no name", "127.0.0.1", "/host/token?resource=r", "ns", "", 400, identity.RequestMalformed},
		{"no resource", "127.0.0.1", "/host/token", "ns", "x", 400, identity.ResourceMissing},
		{"not from the node", "10.0.0.1", "/host/token?resource=r", "ns", "x", 403, identity.RouteBlocked},
		{"the pods' own route", "127.0.0.1", nmitest.TokenPath, "ns", "x", 404, identity.PathUnknown},
		{"a path that is not plain", "127.0.0.1", "/host/%2e%2e/host/token?resource=r", "ns", "x", 400, identity.PathRefused},
	} {
		status, body := b.askHost(c.source, c.target, c.namespace, c.pod)
		if status != c.status || !strings.Contains(body, `"reason":"`+string(c.reason)+`"`) {
			t.Errorf("%s: %d %s", c.name, status, body)
		}
	}
	if status, body := b.ask("10.0.0.1", "/host/token?resource=r", "podns: ns", "podname: x"); status != 404 {
		t.Errorf("pods must not have this route: %d %v", status, body)
	}
}

func TestEachTokenRequestHasOneAuditRecord(t *testing.T) {
	b := newBench(t)
	core, audit := observer.New(zap.InfoLevel)
	b.logs.Audit = zap.New(core)
	b.ask("10.0.0.1", nmitest.TokenPath)
	b.ask("10.0.0.3", nmitest.TokenPath)
	b.ask("10.0.0.3", "/metadata/versions")
	b.askHost("127.0.0.1", "/host/token?resource=r", "ns", "x")
	lines := audit.TakeAll()
	if len(lines) != 3 || b.lines.Len() != 1 {
		t.Fatalf("%d audit records and %d lines in the main log; want 3 and 1", len(lines), b.lines.Len())
	}
	issued, refused := lines[0], lines[1]
	for key, want := range map[string]any{telemetry.KeyNamespace: "ns", telemetry.KeyPod: "x", telemetry.KeyPodUID: "1", telemetry.KeyServiceAccount: "default", telemetry.KeyIdentity: "ns/x",
		telemetry.KeyResource: "https://vault.azure.net", telemetry.KeyReason: "allowed", telemetry.KeyCache: "fetched", telemetry.KeyTokenID: "id-of-" + nmitest.ClientX, telemetry.KeyCorrelationID: "correlation"} {
		if got := issued.ContextMap()[key]; got != want {
			t.Errorf("%s is %v, want %v", key, got, want)
		}
	}
	if issued.Level != zap.InfoLevel || refused.Level != zap.WarnLevel || refused.ContextMap()[telemetry.KeyReason] != "pod_not_labelled" {
		t.Errorf("the records are %v and %v; want one of level info, then one of level warn with the reason pod_not_labelled", issued, refused)
	}
}
