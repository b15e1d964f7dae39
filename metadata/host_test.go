package metadata

import (
	"bufio"
	"net/http"
	"strings"
	"testing"
)

// FuzzParseHostToken checks that each request to /host/token is refused, or names one pod and one resource in printable
// text.
func FuzzParseHostToken(f *testing.F) {
	f.Add("/host/token?resource=https://vault.azure.net", "ns", "pod")
	f.Add("/host/token/?resource=r&client_id=x&client_id=y", "ns", "pod")
	f.Add("/host/%74oken?resource=r", "", "a/b")
	f.Add("/host\\token?resource=%00", "ns\x00", "pod")
	f.Fuzz(func(t *testing.T, target, namespace, name string) {
		if strings.ContainsAny(target+namespace+name, "\r\n") {
			return
		}
		raw := "GET " + target + " HTTP/1.1\r\nHost: 127.0.0.1\r\npodns: " + namespace + "\r\npodname: " + name + "\r\n\r\n"
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(raw)))
		if err != nil {
			return
		}
		req, refusal := ParseHostToken(r)
		if refusal != nil {
			if refusal.Status < 400 || refusal.Reason == "" {
				t.Errorf("refused with %+v", refusal)
			}
			return
		}
		if req.Route != RouteHostToken || req.Resource == "" || req.PodNamespace == "" || req.PodName == "" || !printable(req.PodNamespace+req.PodName+req.Resource) {
			t.Errorf("parsed as %+v, want one pod and one resource in printable text", req)
		}
	})
}
