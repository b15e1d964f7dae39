package server

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/podidentity/podidentity/identity"
	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

func TestEachPodGetsItsOwnTokenAndNoOther(t *testing.T) {
	const resourceX = "/SUBSCRIPTIONS/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/x"
	cases := []struct {
		name, source, query string
		status              int
		reason              identity.Reason
		token, description  string
	}{
		{"the bound identity", "10.0.0.1", "", 200, identity.Allowed, "token-of-" + nmitest.ClientX, ""},
		{"the bound identity, named", "10.0.0.1", "&client_id=" + nmitest.ClientX, 200, identity.Allowed, "token-of-" + nmitest.ClientX, ""},
		{"the identity of another pod, named", "10.0.0.1", "&client_id=" + nmitest.ClientY, 400, identity.IdentityNotBound, "", "Identity not found"},
		{"two identities", "10.0.0.2", "", 400, identity.MultipleIdentities, "", "Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request"},
		{"two identities, by client id", "10.0.0.2", "&client_id=" + nmitest.ClientY, 200, identity.Allowed, "token-of-" + nmitest.ClientY, ""},
		{"two identities, by resource id", "10.0.0.2", "&msi_res_id=" + resourceX, 200, identity.Allowed, "token-of-" + nmitest.ClientX, ""},
		{"two identities, by the other name of the parameter", "10.0.0.2", "&mi_res_id=" + resourceX, 200, identity.Allowed, "token-of-" + nmitest.ClientX, ""},
		{"two identities, by object id", "10.0.0.2", "&object_id=OBJECT-of-" + nmitest.ClientY, 200, identity.Allowed, "token-of-" + nmitest.ClientY, ""},
		{"an unknown object id", "10.0.0.2", "&object_id=x", 400, identity.IdentityNotBound, "", "Identity not found"},
		{"no binding", "10.0.0.3", "", 400, identity.PodNotLabelled, "", "Identity not found"},
		{"no binding, but a name", "10.0.0.3", "&client_id=" + nmitest.ClientX, 400, identity.PodNotLabelled, "", "Identity not found"},
		{"excepted", "10.0.0.4", "", 200, identity.Excepted, "token-of-", ""},
		{"excepted, with a name", "10.0.0.4", "&client_id=" + nmitest.ClientY, 200, identity.Excepted, "token-of-" + nmitest.ClientY, ""},
		{"a Secret of another namespace", "10.0.0.8", "", 403, identity.SecretNotAllowed, "", ""},
		{"a federated identity", "10.0.0.9", "", 200, identity.Allowed, "token-of-" + nmitest.ClientF, ""},
		{"an address of two pods", "10.0.0.6", "", 503, identity.PodAmbiguous, "", ""},
		{"an unknown address", "10.0.0.99", "", 503, identity.PodUnknown, "", ""},
	}
	b := newBench(t)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b.lines.TakeAll()
			before := testutil.ToFloat64(b.metrics.Decisions.WithLabelValues(string(c.reason)))
			status, body := b.ask(c.source, nmitest.TokenPath+c.query)
			if status != c.status || body["access_token"] != c.token {
				t.Errorf("got %d %v", status, body)
			}
			if c.description != "" && body["error_description"] != c.description {
				t.Errorf("IMDS responds %q, NMI %q", c.description, body["error_description"])
			}
			if status != 200 && body["reason"] != string(c.reason) {
				t.Errorf("the reason is %q, not %s", body["reason"], c.reason)
			}
			if (status == 503) != (body["Retry-After"] != "") {
				t.Errorf("status %d with Retry-After %q", status, body["Retry-After"])
			}
			lines := b.lines.TakeAll()
			if len(lines) != 1 || lines[0].ContextMap()[telemetry.KeyReason] != string(c.reason) {
				t.Errorf("the log has %v; want one line with the reason of the response", lines)
			}
			if after := testutil.ToFloat64(b.metrics.Decisions.WithLabelValues(string(c.reason))); after != before+1 {
				t.Errorf("the number of decisions with this reason went from %v to %v; want one more", before, after)
			}
		})
	}
}

func TestNoTokenAndNoCompleteClientIDIsLogged(t *testing.T) {
	b := newBench(t)
	b.ask("10.0.0.1", nmitest.TokenPath)
	b.ask("10.0.0.1", nmitest.TokenPath+"&client_id="+nmitest.ClientY)
	b.ask("10.0.0.1", nmitest.TokenPath+"&client_id="+strings.Repeat("z", 2000))
	for _, line := range b.lines.TakeAll() {
		text := fmt.Sprint(line.ContextMap())
		if strings.Contains(text, "token-of-") || strings.Contains(text, "client_id:"+nmitest.ClientX) || len(line.ContextMap()[telemetry.KeyClientID].(string)) > 20 {
			t.Errorf("the log line has a token or a complete client ID: %s", text)
		}
	}
}

func TestADisconnectedClientIsLoggedAndGetsNoResponse(t *testing.T) {
	b := newBench(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := httptest.NewRequest(http.MethodGet, nmitest.TokenPath, nil).WithContext(ctx)
	r.RemoteAddr = "10.0.0.99:1"
	r.Header.Set("Metadata", "true")
	w := httptest.NewRecorder()
	b.ServeHTTP(w, r)
	if line := b.lines.TakeAll()[0].ContextMap(); w.Body.Len() != 0 || line[telemetry.KeyReason] != "client_gone" {
		t.Errorf("the response is %s, the log line %v; want no response and the reason client_gone", w.Body, line)
	}
}

func TestTheOtherRoutes(t *testing.T) {
	b := newBench(t)
	if status, body := b.ask("10.0.0.3", "/metadata/identity/info?api-version=2018-02-01"); status != 200 || body["tenantId"] != "the-tenant" {
		t.Errorf("info: %d %v", status, body)
	}
	if status, body := b.ask("10.0.0.3", "/metadata/instance?api-version=2021-02-01"); status != 503 || body["reason"] != "upstream_unavailable" {
		t.Errorf("instance, without IMDS: %d %v", status, body)
	}
	b.cfg.BlockInstanceMetadata = true
	if status, body := b.ask("10.0.0.3", "/metadata/instance/compute?api-version=2021-02-01"); status != 403 || body["reason"] != "route_blocked" {
		t.Errorf("instance, blocked: %d %v", status, body)
	}
	if status, body := b.ask("10.0.0.1", "/metadata/identity/issuecredential"); status != 404 || body["error"] != "not_found" {
		t.Errorf("credentials of the VM: %d %v", status, body)
	}
}
