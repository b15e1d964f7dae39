package health

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestReadinessNamesWhatIsMissing(t *testing.T) {
	h := New()
	get := func(path string) (int, string) {
		w := httptest.NewRecorder()
		h.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code, w.Body.String()
	}
	if code, body := get("/readyz"); code != 503 || !strings.Contains(body, "listener") || !strings.Contains(body, "caches") {
		t.Errorf("/readyz at the start: %d %s", code, body)
	}
	for _, what := range []string{Listener, Rules, Caches} {
		h.Set(what, nil)
	}
	h.Set(CRDs, errors.New("the cluster does not have azureidentities"))
	if code, body := get("/readyz"); code != 503 || !strings.Contains(body, "azureidentities") || strings.Contains(body, "listener") {
		t.Errorf("/readyz without CRDs: %d %s", code, body)
	}
	h.Set(CRDs, nil)
	if code, _ := get("/readyz"); code != 200 {
		t.Errorf("/readyz with all parts present: status %d", code)
	}
	h.ShutDown()
	if code, body := get("/readyz"); code != 503 || !strings.Contains(body, "shutting down") {
		t.Errorf("/readyz after ShutDown: %d %s", code, body)
	}
	if code, _ := get("/healthz"); code != 200 {
		t.Errorf("/healthz after ShutDown: status %d", code)
	}
}
