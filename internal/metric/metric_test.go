package metric

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

func TestCollectorsHaveWhatTheDefinitionSays(t *testing.T) {
	r := prometheus.NewRegistry()
	counter := Definition{Name: "c", Help: "Counts.", Type: Counter}.NewCounter()
	counters := Definition{Name: "cv", Help: "Counts.", Type: Counter, Labels: []string{"what"}}.NewCounterVec()
	gauge := Definition{Name: "g", Help: "Is.", Type: Gauge, Deprecated: "since v2; use gf"}.NewGauge()
	read := Definition{Name: "gf", Help: "Is.", Type: Gauge}.NewGaugeFunc(func() float64 { return 7 })
	histogram := Definition{Name: "h", Help: "Takes.", Type: Histogram, Buckets: []float64{1, 2}}.NewHistogram()
	histograms := Definition{Name: "hv", Help: "Takes.", Type: Histogram, Labels: []string{"what"}, Buckets: []float64{1}}.NewHistogramVec()
	r.MustRegister(counter, counters, gauge, read, histogram, histograms)
	counter.Inc()
	counters.WithLabelValues("x").Inc()
	histogram.Observe(1.5)
	histograms.WithLabelValues("x").Observe(1)

	w := httptest.NewRecorder()
	promhttp.HandlerFor(r, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	want := strings.TrimLeft(`
# HELP c Counts.
# TYPE c counter
c 1
# HELP cv Counts.
# TYPE cv counter
cv{what="x"} 1
# HELP g Is. (Deprecated: since v2; use gf)
# TYPE g gauge
g 0
# HELP gf Is.
# TYPE gf gauge
gf 7
# HELP h Takes.
# TYPE h histogram
h_bucket{le="1"} 0
h_bucket{le="2"} 1
h_bucket{le="+Inf"} 1
h_sum 1.5
h_count 1
# HELP hv Takes.
# TYPE hv histogram
hv_bucket{what="x",le="1"} 1
hv_bucket{what="x",le="+Inf"} 1
hv_sum{what="x"} 1
hv_count{what="x"} 1
`, "\n")
	if diff := cmp.Diff(want, w.Body.String()); diff != "" {
		t.Errorf("the exposition differs (-want +got):\n%s", diff)
	}
}

func TestADefinitionUsedAsAnotherTypePanics(t *testing.T) {
	for name, use := range map[string]func(){
		"type":   func() { Definition{Name: "c", Type: Counter}.NewGauge() },
		"labels": func() { Definition{Name: "c", Type: Counter, Labels: []string{"what"}}.NewCounter() },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("the wrong use of the definition did not panic")
				}
			}()
			use()
		})
	}
}
