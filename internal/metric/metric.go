// Package metric describes metrics as data. NMI and MIC each have one table of Definitions and make their collectors
// from it. The reference in docs/reference is generated from the same tables, so it cannot differ from the code.
package metric

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// Type is the type of a metric, spelled as Prometheus spells it.
type Type string

// The types of metrics in use.
const (
	Counter   Type = "counter"
	Gauge     Type = "gauge"
	Histogram Type = "histogram"
)

// Definition is one metric. A label must have few values, none of which a client chooses.
type Definition struct {
	Name    string
	Help    string
	Type    Type
	Labels  []string
	Buckets []float64 // of a histogram
	// Values lists, by label, the values of each label whose values are fixed. Only the generator of the documentation
	// reads it.
	Values map[string][]string
	// Deprecated says since when the metric is deprecated and what replaces it. "" means that it is not deprecated.
	Deprecated string
}

func (d Definition) help() string {
	if d.Deprecated != "" {
		return d.Help + " (Deprecated: " + d.Deprecated + ")"
	}
	return d.Help
}

// check panics if the program creates a collector of another type than that of the definition, with labels although the
// definition has none, or without labels although the definition has some. Each process creates its collectors when it
// starts, so a mistake shows at once.
func (d Definition) check(t Type, labels bool) {
	if d.Type != t || labels != (len(d.Labels) > 0) {
		panic(fmt.Sprintf("metric %s is defined as a %s with labels %v, but the program creates a %s (with labels: %t)", d.Name, d.Type, d.Labels, t, labels))
	}
}

func (d Definition) opts() prometheus.Opts { return prometheus.Opts{Name: d.Name, Help: d.help()} }

func (d Definition) histogramOpts() prometheus.HistogramOpts {
	return prometheus.HistogramOpts{Name: d.Name, Help: d.help(), Buckets: d.Buckets}
}

// NewCounter returns the counter that d defines. Neither this nor any other method of Definition registers the
// collector.
func (d Definition) NewCounter() prometheus.Counter {
	d.check(Counter, false)
	return prometheus.NewCounter(prometheus.CounterOpts(d.opts()))
}

// NewCounterVec returns the counter with labels that d defines.
func (d Definition) NewCounterVec() *prometheus.CounterVec {
	d.check(Counter, true)
	return prometheus.NewCounterVec(prometheus.CounterOpts(d.opts()), d.Labels)
}

// NewGauge returns the gauge that d defines.
func (d Definition) NewGauge() prometheus.Gauge {
	d.check(Gauge, false)
	return prometheus.NewGauge(prometheus.GaugeOpts(d.opts()))
}

// NewGaugeVec returns the gauge with labels that d defines.
func (d Definition) NewGaugeVec() *prometheus.GaugeVec {
	d.check(Gauge, true)
	return prometheus.NewGaugeVec(prometheus.GaugeOpts(d.opts()), d.Labels)
}

// NewGaugeFunc returns the gauge that d defines, with the value that read returns at each scrape.
func (d Definition) NewGaugeFunc(read func() float64) prometheus.GaugeFunc {
	d.check(Gauge, false)
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts(d.opts()), read)
}

// NewHistogram returns the histogram that d defines.
func (d Definition) NewHistogram() prometheus.Histogram {
	d.check(Histogram, false)
	return prometheus.NewHistogram(d.histogramOpts())
}

// NewHistogramVec returns the histogram with labels that d defines.
func (d Definition) NewHistogramVec() *prometheus.HistogramVec {
	d.check(Histogram, true)
	return prometheus.NewHistogramVec(d.histogramOpts(), d.Labels)
}
