package mic

import (
	"math"
	"strings"
	"testing"
	"time"
)

// complete returns the defaults, and values for the required settings that have no default.
func complete() Config {
	c := DefaultConfig()
	c.Namespace = "podidentity-system"
	c.LeaderElection.Namespace, c.LeaderElection.Instance = c.Namespace, "mic-1"
	return c
}

func TestTheDefaultsWithNamespaceAndInstanceAreValid(t *testing.T) {
	if err := complete().Validate(); err != nil {
		t.Error(err)
	}
}

func TestAnInvalidSettingIsRefusedWithOneSentence(t *testing.T) {
	cases := []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"no namespace", func(c *Config) { c.Namespace, c.LeaderElection.Namespace = "", "" }, "give --namespace, or set MIC_POD_NAMESPACE"},
		{"an invalid namespace", func(c *Config) { c.Namespace = "Kube.System" }, `--namespace "Kube.System"`},
		{"a name instead of a client ID", func(c *Config) { c.Immutable = []string{"kubelet"} }, `--immutable-user-msis: "kubelet"`},
		{"one comma too many", func(c *Config) { c.Immutable = []string{"c11e0000-0000-4000-8000-000000000001", ""} }, `--immutable-user-msis: ""`},
		{"a client ID that is too long", func(c *Config) { c.Immutable = []string{"c11e0000-0000-4000-8000-0000000000012"} }, "is not a client ID"},
		{"interval too short", func(c *Config) { c.ReconcileInterval = 9 * time.Second }, "--identity-assignment-reconcile-interval 9s"},
		{"interval too long", func(c *Config) { c.ReconcileInterval = 2 * time.Hour }, "give a time from 10s to 1h0m0s"},
		{"negative delay", func(c *Config) { c.DetachDelay = -time.Second }, "--detach-delay -1s"},
		{"delay too long", func(c *Config) { c.DetachDelay = 61 * time.Minute }, "--detach-delay 1h1m0s"},
		{"no requests", func(c *Config) { c.QPS = 0 }, "--client-qps 0"},
		{"too many requests", func(c *Config) { c.QPS = 10001 }, "--client-qps 10001"},
		{"not a number of requests", func(c *Config) { c.QPS = float32(math.NaN()) }, "--client-qps NaN"},
		{"no burst", func(c *Config) { c.Burst = 0 }, "--client-burst 0"},
		{"no workers", func(c *Config) { c.Workers = 0 }, "--workers 0"},
		{"port 0", func(c *Config) { c.ProbePort = 0 }, "--http-probe-port 0"},
		{"port 70000", func(c *Config) { c.PrometheusPort = 70000 }, "--prometheus-port 70000"},
		{"one port for both", func(c *Config) { c.PrometheusPort = c.ProbePort }, "must differ"},
		{"the profiler's port", func(c *Config) { c.Profile, c.ProbePort = true, 6060 }, "must differ"},
		{"no instance", func(c *Config) { c.LeaderElection.Instance = "" }, "--leader-election-instance"},
		{"no namespace for the lease", func(c *Config) { c.LeaderElection.Namespace = "" }, "--leader-election-namespace"},
		{"no name for the lease", func(c *Config) { c.LeaderElection.Name = "" }, "--leader-election-name"},
		{"an invalid name for the lease", func(c *Config) { c.LeaderElection.Name = "MIC" }, `--leader-election-name "MIC"`},
		{"lease too short", func(c *Config) { c.LeaderElection.Duration = time.Second }, "--leader-election-duration 1s"},
		{"lease too long", func(c *Config) { c.LeaderElection.Duration = time.Hour }, "give a time from 5s to 5m0s"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			config := complete()
			c.change(&config)
			err := config.Validate()
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v; want one sentence about %q", err, c.want)
			}
		})
	}
}

func TestTheLimitsOfRangesAreAllowed(t *testing.T) {
	for _, change := range []func(*Config){
		func(c *Config) { c.DetachDelay = 0 },
		func(c *Config) { c.DetachDelay = time.Hour },
		func(c *Config) { c.ReconcileInterval = 10 * time.Second },
		func(c *Config) { c.ReconcileInterval = time.Hour },
		func(c *Config) { c.QPS = 1 },
		func(c *Config) { c.QPS = 10000 },
		func(c *Config) { c.LeaderElection.Duration = 5 * time.Second },
		func(c *Config) { c.LeaderElection.Duration = 5 * time.Minute },
		func(c *Config) { c.Immutable = []string{"C11E0000-0000-4000-8000-00000000000a"} },
		func(c *Config) { c.ProbePort = 6060 }, // no conflict: the profiler is disabled
	} {
		config := complete()
		change(&config)
		if err := config.Validate(); err != nil {
			t.Error(err)
		}
	}
}

func TestAllProblemsAreReportedAtOnce(t *testing.T) {
	err := Config{DetachDelay: -1}.Validate()
	if err == nil || strings.Count(err.Error(), "\n") < 9 {
		t.Errorf("Validate reports fewer than ten problems of an empty configuration: %v", err)
	}
}
