package azure

import (
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestATokenAnswerHasTheFieldsOfIMDSInItsOrderAndAsStrings(t *testing.T) {
	s := start(t)
	s.add(red, "a")
	a := s.get(nodeA, tokenQuery)
	form := regexp.MustCompile(`^\{"access_token":"[^"]+","client_id":"` + red.ClientID + `","expires_in":"86(399|400)","expires_on":"\d+",` +
		`"ext_expires_in":"86399","not_before":"\d+","resource":"https://vault.azure.net","token_type":"Bearer"\}$`)
	if a.status != 200 || !form.MatchString(a.body) {
		t.Fatalf("got status %d, body %s; want 200 with the fields of IMDS, as strings, in its order", a.status, a.body)
	}
	if got := a.header.Get("Server"); got != "IMDS/150.870.65.1103" {
		t.Errorf("response header Server: got %s, want IMDS/150.870.65.1103", got)
	}
	if got := a.header.Get("Content-Type"); got != "application/json; charset=utf-8" {
		t.Errorf("response header Content-Type: got %s, want application/json; charset=utf-8", got)
	}
	answer := a.token(t)
	on, _ := strconv.Atoi(answer.ExpiresOn)
	nbf, _ := strconv.Atoi(answer.NotBefore)
	if on-nbf != 86700 {
		t.Errorf("expires_on - not_before = %d, want 86700", on-nbf)
	}
}

func TestATokenVerifiesAndCarriesTheIdentity(t *testing.T) {
	s := start(t)
	s.add(red, "a")
	raw := s.get(nodeA, tokenQuery+"/").token(t).AccessToken
	claims, err := s.Verify(raw)
	s.must(err)
	if claims.Audience != "https://vault.azure.net/" || claims.AppID != red.ClientID || claims.ObjectID != red.ObjectID ||
		claims.Subject != red.ObjectID || claims.TenantID != tenant || claims.ResourceID != red.ResourceID {
		t.Errorf("claims %+v, want the requested audience and the identity red", claims)
	}
	if claims.TokenID != s.lastEntry().TokenID {
		t.Error("the log entry does not have the token ID of the token")
	}
	forged := []byte(raw)
	forged[len(forged)-10] ^= 1
	if _, err := s.Verify(string(forged)); err == nil {
		t.Error("Verify accepts a token with a changed signature")
	}
}

func TestTheResourceIsReturnedByteForByte(t *testing.T) {
	s := start(t)
	s.add(red)
	for _, resource := range []string{"https://a.test/x?y=<&>", "api://" + guid(9), guid(9), "https://a.test//"} {
		escaped := strings.NewReplacer("&", "%26", "?", "%3f").Replace(resource)
		a := s.get(nodeA, "/metadata/identity/oauth2/token?api-version=2018-02-01&resource="+escaped)
		if got := a.token(t).Resource; got != resource || !strings.Contains(a.body, resource) {
			t.Errorf("resource %s: got the response %s, want the resource byte for byte", resource, a.body)
		}
	}
}

func TestInvalidTokenRequestsHaveTheErrorsOfIMDS(t *testing.T) {
	s := start(t)
	s.add(red, "a")
	flat := func(code, text string) string { return `{"error":"` + code + `","error_description":"` + text + `"}` }
	notFound := flat("invalid_request", "Identity not found")
	if len(notFound) != 68 { // the length that was captured from the real IMDS
		t.Fatalf("the expected body has %d bytes, want 68", len(notFound))
	}
	ok := "Metadata: true"
	for name, c := range map[string]struct {
		method, target string
		headers        []string
		status         int
		body           string
	}{
		"no header":         {"GET", tokenQuery, nil, 400, flat("invalid_request", "Required metadata header not specified")},
		"another header":    {"GET", tokenQuery, []string{"Metadata: yes"}, 400, flat("invalid_request", "Required metadata header not specified")},
		"forwarded":         {"GET", tokenQuery, []string{ok, "X-Forwarded-For: 10.0.0.1"}, 400, ""},
		"forwarded, empty":  {"GET", tokenQuery, []string{ok, "X-Forwarded-For:"}, 400, ""},
		"no api-version":    {"GET", "/metadata/identity/oauth2/token?resource=https://a.test", []string{ok}, 400, ""},
		"early api-version": {"GET", "/metadata/identity/oauth2/token?api-version=2017-08-01&resource=https://a.test", []string{ok}, 400, ""},
		"no resource":       {"GET", "/metadata/identity/oauth2/token?api-version=2018-02-01", []string{ok}, 400, flat("invalid_request", "Required audience parameter not specified")},
		"twice":             {"GET", tokenQuery + "&resource=https://b.test", []string{ok}, 400, ""},
		"twice, other case": {"GET", tokenQuery + "&Resource=https://b.test", []string{ok}, 400, ""},
		"two selectors":     {"GET", tokenQuery + "&client_id=" + red.ClientID + "&object_id=" + red.ObjectID, []string{ok}, 400, ""},
		"two resource ids":  {"GET", tokenQuery + "&msi_res_id=" + red.ResourceID + "&mi_res_id=" + red.ResourceID, []string{ok}, 400, ""},
		"unknown identity":  {"GET", tokenQuery + "&client_id=" + blue.ClientID, []string{ok}, 400, notFound},
		"bad escape":        {"GET", tokenQuery + "&client_id=%zz", []string{ok}, 400, ""},
		"POST":              {"POST", tokenQuery, []string{ok, "Content-Length: 0"}, 405, ""},
		"HEAD":              {"HEAD", tokenQuery, []string{ok}, 405, ""},
	} {
		a := s.send(nodeA, c.method, c.target, c.headers...)
		if a.status != c.status || c.body != "" && a.body != c.body || strings.Contains(a.body, "access_token") {
			t.Errorf("%s: got status %d, body %s; want those of the table, and no token", name, a.status, a.body)
		}
		if e := s.lastEntry(); e.Status != c.status || e.Error == "" || e.TokenID != "" {
			t.Errorf("%s: logged as %+v, want the status of the table, an error and no token ID", name, e)
		}
	}
	a := s.get(nodeA, "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://nothing.invalid")
	if a.status != 400 || !strings.HasPrefix(a.body, `{"error":"invalid_resource","error_description":"AADSTS500011: `) {
		t.Errorf("unknown resource: got status %d, body %s; want 400 with invalid_resource and AADSTS500011",
			a.status, a.body)
	}
}

func TestTheDefaultIdentityIsThatOfIMDS(t *testing.T) {
	s := start(t, func(c *Config) { c.Nodes[1].SystemAssigned = &system })
	if a := s.get(nodeA, tokenQuery); !strings.Contains(a.body, "Identity not found") {
		t.Errorf("with no identity attached: got %s, want Identity not found", a.body)
	}
	s.add(red)
	if got := s.get(nodeA, tokenQuery).token(t).ClientID; got != red.ClientID {
		t.Errorf("with one identity attached: got a token of %s, want red", got)
	}
	s.add(blue)
	want := `{"error":"invalid_request","error_description":"Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request"}`
	if a := s.get(nodeA, tokenQuery); a.status != 400 || a.body != want {
		t.Errorf("with two identities attached: got %d %s, want 400 with the error for multiple identities",
			a.status, a.body)
	}
	if got := s.get(nodeB, tokenQuery).token(t).ClientID; got != system.ClientID {
		t.Errorf("on node b: got a token of %s, want the system-assigned identity", got)
	}
}

func TestSelectorsAreNotCaseSensitive(t *testing.T) {
	s := start(t)
	s.add(red)
	s.add(blue)
	for _, sel := range []string{
		"client_id=" + strings.ToUpper(blue.ClientID), "object_id=" + blue.ObjectID,
		"msi_res_id=" + strings.ToLower(blue.ResourceID), "mi_res_id=" + strings.ToUpper(blue.ResourceID),
	} {
		if got := s.get(nodeA, tokenQuery+"&"+sel).token(t).ClientID; got != blue.ClientID {
			t.Errorf("selector %s: got a token of %s, want blue", sel, got)
		}
	}
}

func TestIMDSProvidesAnIdentityOnlyWhereItIsAttached(t *testing.T) {
	s := start(t)
	s.add(red, "a")
	s.get(nodeA, tokenQuery).token(t)
	if a := s.get(nodeB, tokenQuery); a.status != 400 {
		t.Errorf("node b, to which the identity is not attached: got %s, want status 400", a.body)
	}
	s.must(s.Detach(t.Context(), red.ClientID, "a"))
	if a := s.get(nodeA, tokenQuery); a.status != 400 {
		t.Errorf("node a after detaching: got %s, want status 400", a.body)
	}
	s.add(red, "b")
	s.get(nodeB, tokenQuery).token(t)
	s.must(s.RemoveIdentity(t.Context(), red.ResourceID))
	if a := s.get(nodeB, tokenQuery); a.status != 400 {
		t.Errorf("node b after removing the identity: got %s, want status 400", a.body)
	}
}

func TestPathsThatTheRealServiceAcceptsReturnAToken(t *testing.T) {
	s := start(t)
	s.add(red)
	query := tokenQuery[strings.Index(tokenQuery, "?"):]
	for path, want := range map[string]int{
		`/metadata/identity/oauth2/token`:                       200,
		`/metadata/identity/oauth2/token/`:                      200,
		`/metadata/identity\oauth2\token/`:                      200,
		`/metadata/identity%5coauth2%5Ctoken`:                   200,
		`/metadata/identity%2foauth2/token`:                     200,
		`//metadata//identity/oauth2///token`:                   200,
		`/METADATA/identity/oauth2/token`:                       200,
		`/metadata/instance/../identity/oauth2/token`:           200,
		`/metadata/instance/%2e%2e/identity/oauth2/token`:       200,
		`http://169.254.169.254/metadata/identity/oauth2/token`: 200,
		`http://elsewhere.test/\metadata/identity/oauth2/token`: 200,
		`/metadata/identity/oauth2/tok%65n`:                     200,
		`/metadata/Identity/oauth2/token`:                       404,
		`/metadata/identity/oauth2/token;x`:                     404,
		`/metadata/identity/oauth2/token%00`:                    404,
		`/identity/oauth2/token`:                                404,
		`/metadata`:                                             404,
		`/metadata/identity/oauth2`:                             404,
	} {
		if a := s.get(podA, path+query); a.status != want {
			t.Errorf("path %s: got status %d, body %s; want the status of the table", path, a.status, a.body)
		}
		if e := s.lastEntry(); e.Path != path+query || !e.FromPod || (want == 200) != (e.Class == classToken) {
			t.Errorf("path %s: logged as %+v, want the path as sent, from a pod, and class token only for 200", path, e)
		}
	}
}

func TestTheCacheReturnsTheSameTokenAndCountsDown(t *testing.T) {
	s := start(t)
	s.add(red)
	first := s.get(nodeA, tokenQuery).token(t)
	s.clock.advance(10 * time.Minute)
	second := s.get(nodeA, tokenQuery).token(t)
	if second.AccessToken != first.AccessToken || second.ExpiresOn != first.ExpiresOn || second.ExtExpiresIn != first.ExtExpiresIn {
		t.Error("the second response does not have the token, expires_on and ext_expires_in of the first response")
	}
	was, _ := strconv.Atoi(first.ExpiresIn)
	is, _ := strconv.Atoi(second.ExpiresIn)
	if was-is != 600 {
		t.Errorf("expires_in fell by %d, want 600", was-is)
	}
	if !s.lastEntry().Cached {
		t.Error("the token from the cache is not logged as cached")
	}
	for name, again := range map[string]func() string{
		"another node": func() string { return s.get(nodeB, tokenQuery).token(t).AccessToken },
		"bypass":       func() string { return s.get(nodeA, tokenQuery+"&bypass_cache=true").token(t).AccessToken },
		"resource":     func() string { return s.get(nodeA, tokenQuery+"/").token(t).AccessToken },
		"cache off": func() string {
			s.set("imds.cache=false")
			return s.get(nodeA, tokenQuery).token(t).AccessToken
		},
	} {
		if again() == first.AccessToken {
			t.Errorf("%s: got the cached token, want a new one", name)
		}
	}
	st := s.stats().Tokens[red.ClientID]
	if st.Answered != 6 || st.Minted != 5 {
		t.Errorf("counted %+v, want 6 tokens, 5 of them new", st)
	}
}

func TestATokenThatExpiresSoonIsReplaced(t *testing.T) {
	s := start(t)
	s.add(red)
	s.set("imds.token-lifetime=1h")
	first := s.get(nodeA, tokenQuery).token(t).AccessToken
	s.clock.advance(54 * time.Minute)
	if s.get(nodeA, tokenQuery).token(t).AccessToken != first {
		t.Error("the token was replaced although it is valid for six more minutes")
	}
	s.clock.advance(2 * time.Minute)
	if s.get(nodeA, tokenQuery).token(t).AccessToken == first {
		t.Error("got the cached token in its last five minutes, want a new one")
	}
}

func TestForbiddenEndpointsReturnTheMark(t *testing.T) {
	s := start(t)
	for _, c := range []struct{ method, target, class string }{
		{"GET", "/metadata/identity/getplatformmetadata?cred-api-version=2.0", "getplatformmetadata"},
		{"POST", "/metadata/identity/issuecredential?cred-api-version=2.0", "issuecredential"},
		{"GET", "/metadata/attested/document?api-version=2021-02-01", "attested"},
		{"POST", "/metadata/scheduledevents?api-version=2020-07-01", "scheduledevents"},
	} {
		a := s.send(nodeA, c.method, c.target, "Metadata: true", "Content-Length: 0")
		if a.status != 200 || !strings.Contains(a.body, ForbiddenMark) || s.stats().IMDS.ByClass[c.class] != 1 {
			t.Errorf("%s %s: got %d %s, want 200 with the mark, and one request counted",
				c.method, c.target, a.status, a.body)
		}
	}
}

func TestOtherEndpointsReturnMetadata(t *testing.T) {
	s := start(t)
	for target, want := range map[string]string{
		"/metadata/identity/info?api-version=2018-02-01":                                                              `{"tenantId":"` + tenant + `"}`,
		"/metadata/versions":                                                                                          `"2018-02-01"`,
		"/metadata/loadbalancer?api-version=2020-10-01":                                                               `"loadbalancer"`,
		"/metadata/scheduledevents?api-version=2020-07-01":                                                            `"Events":[]`,
		"/metadata/instance?api-version=2018-02-01":                                                                   `"name":"set_3"`,
		"/metadata/instance/compute?api-version=2021-02-01":                                                           `"vmScaleSetName":"set"`,
		"/metadata/instance/compute/location?api-version=2020-06-01&format=text":                                      "westeurope",
		"/metadata/instance/compute/subscriptionId?api-version=2020-06-01&format=text":                                "sub",
		"/metadata/instance/compute/resourceGroupName?api-version=2020-06-01&format=text":                             "rg",
		"/metadata/instance?api-version=2018-02-01&format=text":                                                       "compute/\nnetwork/",
		"/metadata/instance/network/interface/0/ipv4/ipAddress/0/privateIpAddress?api-version=2020-06-01&format=text": nodeA,
	} {
		if a := s.get(nodeA, target); a.status != 200 || !strings.Contains(a.body, want) {
			t.Errorf("GET %s: got %d %s, want 200 with the text of the table", target, a.status, a.body)
		}
	}
	for target, want := range map[string]int{
		"/metadata/instance": 400,
		"/metadata/instance/compute/location?api-version=2020-06-01":    400,
		"/metadata/instance/compute/nothing?api-version=2020-06-01":     404,
		"/metadata/instance/network/interface/7?api-version=2020-06-01": 404,
		"/metadata/identity/credential?cred-api-version=1.0":            404,
	} {
		if a := s.get(nodeA, target); a.status != want {
			t.Errorf("GET %s: got %d %s, want the status of the table", target, a.status, a.body)
		}
	}
}

func TestARequestFromAnUnknownSourceIsRefused(t *testing.T) {
	s := start(t)
	s.add(red)
	a := s.get(unknownSource, tokenQuery)
	if a.status != 401 || !strings.Contains(a.body, "unknown_source") {
		t.Errorf("got %d %s, want 401 with unknown_source", a.status, a.body)
	}
}
