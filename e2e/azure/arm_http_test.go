package azure

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

func TestInvalidRequestsAreRefusedInTheFormatOfARM(t *testing.T) {
	a := newTestARM(t)
	operations := "/subscriptions/Sub/providers/Microsoft.Compute/locations/westeurope/operations/"
	for _, c := range []struct {
		method, target string
		status         int
		code           string
	}{
		{"GET", setID, 400, "MissingApiVersionParameter"},
		{"GET", setID + "?api-version=", 400, "MissingApiVersionParameter"},
		{"GET", setID + "?api-version=2017-12-01", 400, "InvalidApiVersionParameter"},
		{"GET", setID + "?api-version=latest", 400, "InvalidApiVersionParameter"},
		{"GET", setID + "2" + armV, 404, "ResourceNotFound"},
		{"GET", operations + guid(1) + armV, 404, "NotFound"},
		{"PUT", setID + armV, 404, "NotFound"},
		{"DELETE", setID + armV, 404, "NotFound"},
		{"PATCH", operations + guid(1) + armV, 404, "NotFound"},
		{"GET", setID + "/virtualMachines/0" + armV, 404, "NotFound"},
		{"GET", "/subscriptions/Sub" + armV, 404, "NotFound"},
		{"GET", "/" + armV, 404, "NotFound"},
	} {
		a.mustRefuse(a.do(c.method, c.target, "{}"), c.status, c.code)
		if e := a.lastRequest(); e.Status != c.status || e.Code != c.code || e.Method != c.method || e.Path != c.target {
			t.Errorf("%s %s: logged as %+v, want the method, path, status and code of this case", c.method, c.target, e)
		}
	}
	a.mustRefuse(a.do("PATCH", setID+armV, strings.Repeat(" ", maxBodyBytes+1)), 413, "RequestContentTooLarge")
	for _, target := range []string{strings.ToUpper(setID) + "?API-Version=2018-06-01", strings.ToLower(vmID) + "/?api-version=2026-04-01-preview"} {
		if got := a.do("GET", target, ""); got.status != 200 {
			t.Errorf("GET %s: got %d %s, want 200", target, got.status, got.body)
		}
	}
	began := newTestARM(t, delayed(time.Hour))
	link := began.patchSet("None").header.Get("Azure-AsyncOperation")
	elsewhere := strings.Replace(strings.TrimPrefix(link, "https://management.azure.com"), "/Sub/", "/Other/", 1)
	began.mustRefuse(began.do("GET", elsewhere, ""), 404, "NotFound")
}

func TestADroppedConnectionIsResetOnANetwork(t *testing.T) {
	a := newTestARM(t)
	server := httptest.NewServer(a)
	defer server.Close()
	a.must(a.SetFault(ARMFault{Operation: OpGet, Count: 1, Drop: true}))
	if resp, err := http.Get(server.URL + setID + armV); err == nil {
		t.Errorf("got a response with status %s, want a connection reset", resp.Status)
	}
	a.Change(delayed(time.Minute))
	r, err := http.NewRequest("PATCH", server.URL+setID+armV, strings.NewReader(patchOf("None")))
	a.must(err)
	resp, err := http.DefaultClient.Do(r)
	a.must(err)
	defer resp.Body.Close()
	if link := resp.Header.Get("Azure-AsyncOperation"); !strings.HasPrefix(link, server.URL+"/subscriptions/Sub/") || !strings.HasSuffix(link, armV) {
		t.Errorf("the header Azure-AsyncOperation is %q; want a URL of the test server that ends in the API version",
			link)
	}
}

func TestARMAcceptsOnlyTokensForARM(t *testing.T) {
	good := Claims{Audience: "https://management.azure.com/", TenantID: tenant, ObjectID: guid(2), AppID: guid(1)}
	claims, verifies := good, error(nil)
	a := &testARM{NewARM(ARMOptions{Tenant: tenant, Verify: func(token string) (Claims, error) {
		if token != "t" {
			t.Errorf("Verify got the token %q, want t", token)
		}
		return claims, verifies
	}}), t}
	a.must(a.AddMachine(Machine{ID: setID}))
	a.must(a.DefineIdentity(red))
	get := func(headers ...string) answer { return a.do("GET", setID+armV, "", headers...) }
	const bearer = "Authorization: Bearer t"

	for _, audience := range []string{"https://management.azure.com", "https://management.azure.com/", "https://management.core.windows.net/", "https://management.core.windows.net"} {
		if claims.Audience = audience; get(bearer).status != 200 || a.lastRequest().Caller != guid(2) {
			t.Errorf("a token with the audience %s is refused, or its caller is not logged", audience)
		}
	}
	a.must(a.SetIdentityFault(IdentityFault{Identity: red.ResourceID, Denied: true}))
	e := a.mustRefuse(a.do("PATCH", setID+armV, patchOf("UserAssigned", "+"+red.ResourceID), bearer), 403, "LinkedAuthorizationFailed")
	if !strings.HasPrefix(e.Message, "The client '"+guid(1)+"' with object id '"+guid(2)+"' ") {
		t.Error(e.Message)
	}

	a.mustRefuse(get(), 401, "AuthenticationFailed")
	a.mustRefuse(get("Authorization: Basic t"), 401, "AuthenticationFailed")
	claims.Audience = "https://vault.azure.net"
	got := get(bearer)
	a.mustRefuse(got, 401, "InvalidAuthenticationTokenAudience")
	if !strings.Contains(got.header.Get("WWW-Authenticate"), `error="invalid_token"`) {
		t.Errorf("headers %v; want invalid_token in WWW-Authenticate", got.header)
	}
	claims = good
	claims.TenantID = guid(5)
	a.mustRefuse(get(bearer), 401, "InvalidAuthenticationTokenTenant")
	verifies = jwt.ErrTokenExpired
	a.mustRefuse(get(bearer), 401, "ExpiredAuthenticationToken")
	verifies = errors.New("forged")
	a.mustRefuse(get(bearer), 401, "InvalidAuthenticationToken")
}

func TestARMsLogsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &testARM{NewARM(ARMOptions{LogCapacity: 3}), t}
		a.must(a.DefineIdentity(red))
		a.must(a.AddMachine(Machine{ID: vmID}))
		for range 3 {
			a.do("PATCH", vmID+armV, patchOf("UserAssigned", "+"+red.ResourceID))
			a.do("PATCH", vmID+armV, patchOf("None"))
		}
		log, changes, stats := a.Log(0), a.Changes(0), a.Stats()
		if len(log) != 3 || log[2].Seq != 6 || len(changes) != 3 || changes[0].Seq != 4 || stats.LogDropped != 3 || stats.ChangesDropped != 3 {
			t.Errorf("got %d requests and %d changes, want the newest 3 of each and 3 dropped of each: %+v",
				len(log), len(changes), stats)
		}
		if s := stats.Resources[FoldID(vmID)]; s.Patch != 6 || s.Accepted != 6 || stats.ByStatus[200] != 6 {
			t.Errorf("counted %+v, want 6 accepted PATCH requests", stats)
		}
		a.ResetLog()
		a.get(vmID)
		if log := a.Log(6); len(log) != 1 || log[0].Seq != 7 || len(a.Changes(0)) != 0 || a.Stats().Resources[FoldID(vmID)].Patch != 0 {
			t.Errorf("after the reset and a GET: log %+v, want one entry; counts %+v, want no PATCH", log, a.Stats())
		}
	})
}
