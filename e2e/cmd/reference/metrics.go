package main

import (
	"fmt"
	"strings"

	"github.com/podidentity/podidentity/internal/metric"
	mictelemetry "github.com/podidentity/podidentity/mic/telemetry"
	nmitelemetry "github.com/podidentity/podidentity/nmi/telemetry"
)

func metrics(string) ([]byte, error) {
	nmiRows, err := metricRows(nmitelemetry.Definitions())
	if err != nil {
		return nil, err
	}
	micRows, err := metricRows(mictelemetry.MetricDefinitions())
	if err != nil {
		return nil, err
	}
	header := []string{"Metric", "Type", "Labels", "Description"}
	d := newDocument("Metrics", "nmi/telemetry and mic/telemetry")
	d.paragraph("Names that begin with `aadpodidentity_` are those of AAD Pod Identity. No label has a value that a client chooses. " +
		"[Monitoring](../operate.md#monitoring) says which metrics to watch.")
	d.heading(2, "NMI")
	d.paragraph("At `:9090/metrics` of each node; the chart value is `nmi.prometheusPort`. The metrics of the Go runtime (`go_`) and of the process (`process_`) are there too.")
	d.table(header, nmiRows)
	d.heading(2, "MIC")
	d.paragraph("At `:8888/metrics`; the chart value is `mic.prometheusPort`. Only the values of the leader are meaningful.")
	d.table(header, micRows)
	d.paragraph("controller-runtime adds its own metrics, such as `workqueue_depth` and `workqueue_queue_duration_seconds` with the label `name` " +
		"(pods, machines, bindings).")
	return d.Bytes(), nil
}

// metricRows lists metrics in the order of their definitions. It returns an error for a metric without a description.
func metricRows(definitions []metric.Definition) ([][]string, error) {
	var rows [][]string
	for _, m := range definitions {
		if strings.TrimSpace(m.Help) == "" {
			return nil, fmt.Errorf("the metric %s has no description", m.Name)
		}
		var labels []string
		for _, name := range m.Labels {
			label := code(name)
			if values := m.Values[name]; len(values) > 0 {
				label += " (" + strings.Join(values, ", ") + ")"
			}
			labels = append(labels, label)
		}
		help := plain(m.Help)
		if m.Deprecated != "" {
			help += " Deprecated: " + plain(m.Deprecated) + "."
		}
		rows = append(rows, []string{code(m.Name), string(m.Type), strings.Join(labels, ", "), help})
	}
	return rows, nil
}
