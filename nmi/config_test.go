package nmi

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
)

func TestAnInvalidConfigurationIsRefused(t *testing.T) {
	cases := []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"no node", func(c *Config) { c.Node = "" }, "--node"},
		{"an excessive wait", func(c *Config) { c.AssignmentWait = time.Hour }, "--assignment-wait 1h"},
		{"an unknown mode", func(c *Config) { c.OperationMode = "x" }, `"x"`},
		{"loopback", func(c *Config) { c.ListenAddress = "127.0.0.1" }, "link-local"},
		{"the metadata address itself", func(c *Config) { c.ListenAddress = c.MetadataIP }, "address of its own"},
		{"no address", func(c *Config) { c.MetadataIP = "imds" }, "--metadata-ip"},
		{"an unknown backend", func(c *Config) { c.Backend = "ebtables" }, "--iptables-backend"},
		{"an unknown capture", func(c *Config) { c.CaptureBy = "ebpf" }, "--capture"},
		{"a state folder that depends on the working directory", func(c *Config) { c.StateDir = "state" }, "--state-dir"},
		{"an unknown verification", func(c *Config) { c.PodVerification = "on" }, "--pod-verification"},
		{"verification by cgroup without the cgroup", func(c *Config) { c.PodVerification, c.CaptureBy = "required", CaptureIPTables }, "--capture=both"},
		{"an unknown choice of pods in the host network", func(c *Config) { c.CaptureHostNetwork = "some" }, "--capture-host-network"},
		{"pods in the host network without the cgroup", func(c *Config) { c.CaptureHostNetwork, c.CaptureBy = HostNetworkBound, CaptureIPTables }, "needs the cgroup"},
		{"pods in the host network by address", func(c *Config) { c.CaptureHostNetwork, c.PodVerification = HostNetworkAll, "off" }, "needs the cgroup"},
		{"both listeners on one port", func(c *Config) { c.BPFPort = c.ListenPort }, "--nmi-bpf-port"},
		{"port 0", func(c *Config) { c.ListenPort = 0 }, "--nmi-port 0"},
		{"port 70000", func(c *Config) { c.MetadataPort = 70000 }, "--metadata-port 70000"},
		{"one port twice", func(c *Config) { c.ProbePort = c.PrometheusPort }, "must differ"},
		{"too often", func(c *Config) { c.SyncInterval = time.Millisecond }, "--iptables-sync-interval 1ms"},
		{"too long", func(c *Config) { c.PodLookupTimeout = time.Hour }, "--pod-lookup-timeout"},
		{"no time to stop", func(c *Config) { c.ShutdownTimeout = 0 }, "--shutdown-timeout"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			config := DefaultConfig()
			config.Node = "n"
			if err := config.Validate(); err != nil {
				t.Fatal(err)
			}
			c.change(&config)
			if err := config.Validate(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v; want an error with %q", err, c.want)
			}
		})
	}
}

func TestUninstallRefusesAnInvalidCaptureLikeNMI(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // if the check is missing, Uninstall must not change this host
	for name, change := range map[string]func(*Config){
		"a listen address that is no address": func(c *Config) { c.ListenAddress = "foo" },
		"loopback":                            func(c *Config) { c.ListenAddress = "127.0.0.1" },
		"a metadata IP that is no address":    func(c *Config) { c.MetadataIP = "foo" },
		"the metadata address itself":         func(c *Config) { c.ListenAddress = c.MetadataIP },
		"an unknown back end":                 func(c *Config) { c.Backend = "ebtables" },
		"port 0":                              func(c *Config) { c.ListenPort = 0 },
		"port 65616":                          func(c *Config) { c.MetadataPort = 65616 }, // 80, if cut to 16 bits
	} {
		t.Run(name, func(t *testing.T) {
			config := DefaultConfig()
			config.Node = "n"
			change(&config)
			want := config.Validate()
			config.Node = "" // "nmi uninstall" has no flag for it
			if err := Uninstall(ctx, config, zap.NewNop()); err == nil || want == nil || err.Error() != want.Error() {
				t.Errorf("got %v, want the error of nmi: %v", err, want)
			}
		})
	}
}

func TestKubenetIsRefusedUnlessAllowed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "kubelet")
	config := Config{KubeletConfig: file}
	if err := config.checkKubenet(); err != nil {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(file, []byte("KUBELET_FLAGS=--network-plugin=kubenet --x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := config.checkKubenet(); err == nil || !strings.Contains(err.Error(), "--allow-network-plugin-kubenet") {
		t.Errorf("got %v", err)
	}
	config.AllowKubenet = true
	if err := config.checkKubenet(); err != nil {
		t.Errorf("allowed: %v", err)
	}
}
