package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/podidentity/podidentity/internal/netnstest"
)

func TestParseBackend(t *testing.T) {
	for name, want := range map[string]Backend{"": BackendAuto, "auto": BackendAuto, "nft": BackendNFT, "Legacy": BackendLegacy} {
		if got, err := ParseBackend(name); err != nil || got != want || got.String() != string(want) {
			t.Errorf("%q: got %v, %v", name, got, err)
		}
	}
	if _, err := ParseBackend("ipvs"); err == nil || !strings.Contains(err.Error(), "auto, nft or legacy") {
		t.Errorf("got %v", err)
	}
}

func TestTheBackendWithTheRulesOfTheNodeIsChosen(t *testing.T) {
	const (
		empty = "*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n"
		ours  = "*nat\n:PODIDENTITY-NAT-B - [0:0]\nCOMMIT\n"
		kube  = "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n"
		rule  = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -j ACCEPT\nCOMMIT\n"
	)
	for _, tt := range []struct {
		name, nft, legacy string
		want              Backend
		reason            string
	}{
		{"ours in legacy, Kubernetes in nft", kube + rule, ours, BackendLegacy, "chains of NMI"},
		{"ours in nft, Kubernetes in legacy", ours, kube + rule, BackendNFT, "chains of NMI"},
		{"ours in both, Kubernetes in legacy", ours, ours + kube, BackendLegacy, "Kubernetes"},
		{"Kubernetes in legacy, more rules in nft", rule, kube, BackendLegacy, "Kubernetes"},
		{"Kubernetes in nft", kube, rule, BackendNFT, "Kubernetes"},
		{"Kubernetes in both, more rules in legacy", kube, kube + rule, BackendLegacy, "more rules"},
		{"more rules in legacy", empty, rule, BackendLegacy, "more rules"},
		{"chains without rules in both", empty, empty, BackendNFT, "equally many rules"},
		{"nothing at all", "", "", BackendNFT, "equally many rules"},
	} {
		if got, reason := choose(parseDump(tt.nft), parseDump(tt.legacy)); got != tt.want || !strings.Contains(reason, tt.reason) {
			t.Errorf("%s: got %v because %s", tt.name, got, reason)
		}
	}
}

func TestAnInvalidConfigIsRefused(t *testing.T) {
	good := Config{MetadataIP: testMetadata.Addr(), MetadataPort: 80, Listen: testListen}
	if err := good.check(); err != nil {
		t.Error(err)
	}
	for says, change := range map[string]func(*Config){
		"metadata address": func(c *Config) { c.MetadataIP = netip.MustParseAddr("fd00::1") },
		"metadata port":    func(c *Config) { c.MetadataPort = 0 },
		"route_localnet":   func(c *Config) { c.Listen = netip.MustParseAddrPort("127.0.0.1:2579") },
		"unicast IPv4":     func(c *Config) { c.Listen = netip.MustParseAddrPort("0.0.0.0:2579") },
		"listen port":      func(c *Config) { c.Listen = netip.MustParseAddrPort("169.254.25.79:0") },
		"must differ":      func(c *Config) { c.Listen = netip.MustParseAddrPort("169.254.169.254:2579") },
		"listen address":   func(c *Config) { c.Listen = netip.MustParseAddrPort("[::1]:2579") },
	} {
		c := good
		change(&c)
		if err := c.check(); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v", says, err)
		}
	}
	if (Config{}).check() == nil {
		t.Error("an empty configuration is accepted")
	}
}

func TestAMissingCapabilityIsNamed(t *testing.T) {
	for says, err := range map[string]error{
		"add NET_ADMIN": requireAdmin(1 << unix.CAP_NET_RAW),
		"add NET_RAW":   requireRaw(1 << unix.CAP_NET_ADMIN),
	} {
		if !errors.Is(err, ErrMissingCapability) || !strings.Contains(fmt.Sprint(err), says) {
			t.Errorf("got %v, want one that says %q", err, says)
		}
	}
	const both = 1<<unix.CAP_NET_RAW | 1<<unix.CAP_NET_ADMIN
	if err := errors.Join(requireAdmin(both), requireRaw(both)); err != nil {
		t.Error(err)
	}
}

func legacyTableNames(t *testing.T) string {
	t.Helper()
	names, err := os.ReadFile(legacyTables)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(names))
}

func testConfig(backend Backend) Config {
	return Config{MetadataIP: testMetadata.Addr(), MetadataPort: testMetadata.Port(), Listen: testListen, Backend: backend}
}

func TestDetectionOnAFreshNodeChoosesNFTAndCreatesNoLegacyTables(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		buildNetwork(t)
		core, logs := observer.New(zap.InfoLevel)
		cfg := testConfig(BackendAuto)
		cfg.Logger = zap.New(core)
		c, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if c.Backend() != BackendNFT {
			t.Errorf("got %v", c.Backend())
		}
		if entries := logs.FilterField(zap.Stringer("backend", BackendNFT)).All(); len(entries) != 1 || entries[0].ContextMap()["reason"] == "" {
			t.Errorf("the choice is logged as %v", logs.All())
		}
		for _, do := range []func(context.Context) error{c.EnsureLink, c.Install, c.Verify, c.Uninstall} {
			if err := do(context.Background()); err != nil {
				t.Error(err)
			}
		}
		if names := legacyTableNames(t); names != "" {
			t.Errorf("NMI created legacy tables: %s", names)
		}
	})
}

func TestDetectionChoosesLegacyIfKubernetesUsesIt(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		buildNetwork(t)
		netnstest.Run(t, "iptables-legacy", "-t", "mangle", "-N", "KUBE-KUBELET-CANARY")
		netnstest.Run(t, "iptables-nft", "-A", "INPUT", "-s", "192.0.2.1", "-j", "DROP")
		c, err := New(testConfig(BackendAuto))
		if err != nil {
			t.Fatal(err)
		}
		if c.Backend() != BackendLegacy {
			t.Errorf("got %v", c.Backend())
		}
	})
}

func TestInstallInAnotherBackendCleansThePreviousOne(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		buildNetwork(t)
		dumpOf := func(b Backend) string { return (&testNetwork{t: t, backend: b}).dump() }
		for _, backend := range []Backend{BackendLegacy, BackendNFT, BackendLegacy} {
			c, err := New(testConfig(backend))
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Install(context.Background()); err != nil {
				t.Fatal(err)
			}
			other := map[Backend]Backend{BackendNFT: BackendLegacy, BackendLegacy: BackendNFT}[backend]
			if !strings.Contains(dumpOf(backend), "PODIDENTITY") || strings.Contains(dumpOf(other), "PODIDENTITY") {
				t.Errorf("after installing in %v, it has\n%s\nand the other\n%s", backend, dumpOf(backend), dumpOf(other))
			}
			// In auto mode the next Capture uses the back end of the previous one.
			auto, err := New(testConfig(BackendAuto))
			if err != nil {
				t.Fatal(err)
			}
			if auto.Backend() != backend {
				t.Errorf("our chains are in %v, detected was %v", backend, auto.Backend())
			}
		}
	})
}

func TestUninstallCleansBothBackends(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		buildNetwork(t)
		nft, err := New(testConfig(BackendNFT))
		if err != nil {
			t.Fatal(err)
		}
		if err := nft.Install(context.Background()); err != nil {
			t.Fatal(err)
		}
		// Now both back ends have rules of NMI, as after an interrupted change of the back end.
		legacy, err := New(testConfig(BackendLegacy))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := legacy.Sync(context.Background()); err != nil {
			t.Fatal(err)
		}
		if err := nft.Uninstall(context.Background()); err != nil {
			t.Fatal(err)
		}
		for _, b := range []Backend{BackendNFT, BackendLegacy} {
			if left := (&testNetwork{t: t, backend: b}).dump(); strings.Contains(left, "PODIDENTITY") {
				t.Errorf("%v still has\n%s", b, left)
			}
		}
	})
}

func TestWithoutAProgramNewSaysWhatToInstall(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		bin := t.TempDir()
		t.Setenv("PATH", bin)
		for _, dir := range []string{"/usr/sbin", "/sbin"} {
			if info, err := os.Lstat(dir); err == nil && info.IsDir() {
				if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, backend := range []Backend{BackendAuto, BackendNFT, BackendLegacy} {
			if _, err := New(testConfig(backend)); !errors.Is(err, ErrMissingBinary) || !strings.Contains(fmt.Sprint(err), "install the iptables package") {
				t.Errorf("%v: got %v", backend, err)
			}
		}
		// An image may have only programs named iptables and iptables-save. New recognizes their back end by the output
		// of --version.
		for _, name := range []string{"iptables", "iptables-save"} {
			script := "#!/bin/sh\n[ \"$1\" = --version ] && echo 'iptables v1.8.9 (legacy)'\nexit 0\n"
			if err := os.WriteFile(filepath.Join(bin, name), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if c, err := New(testConfig(BackendAuto)); err != nil || c.Backend() != BackendLegacy {
			t.Errorf("got %+v, %v", c, err)
		}
		if _, err := New(testConfig(BackendNFT)); !errors.Is(err, ErrMissingBinary) {
			t.Errorf("got %v", err)
		}
	})
}

// withoutCapability runs do on a thread without the capability.
func withoutCapability(t *testing.T, capability int, do func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		defer close(done)
		runtime.LockOSThread() // Never unlocked: the thread ends with this goroutine.
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&header, &data[0]); err != nil {
			done <- err
			return
		}
		data[0].Effective &^= 1 << capability
		if err := unix.Capset(&header, &data[0]); err != nil {
			done <- err
			return
		}
		do()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestWithoutACapabilityNewSaysWhatToAddAndChangesNothing(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		buildNetwork(t)
		before := (&testNetwork{t: t, backend: BackendNFT}).dump()
		withoutCapability(t, unix.CAP_NET_ADMIN, func() {
			if _, err := New(testConfig(BackendAuto)); !errors.Is(err, ErrMissingCapability) || !strings.Contains(fmt.Sprint(err), "NET_ADMIN") {
				t.Errorf("got %v", err)
			}
		})
		withoutCapability(t, unix.CAP_NET_RAW, func() {
			if _, err := New(testConfig(BackendLegacy)); !errors.Is(err, ErrMissingCapability) || !strings.Contains(fmt.Sprint(err), "NET_RAW") {
				t.Errorf("got %v", err)
			}
			if c, err := New(testConfig(BackendAuto)); err != nil || c.Backend() != BackendNFT {
				t.Errorf("nft does not need NET_RAW where there are no legacy tables: %v", err)
			}
		})
		netnstest.Run(t, "iptables-legacy", "-t", "mangle", "-N", "KUBE-KUBELET-CANARY")
		withoutCapability(t, unix.CAP_NET_RAW, func() {
			if _, err := New(testConfig(BackendAuto)); !errors.Is(err, ErrMissingCapability) {
				t.Errorf("legacy tables exist and cannot be read without NET_RAW, but New returned %v", err)
			}
			if _, err := New(testConfig(BackendNFT)); err != nil {
				t.Errorf("with nft configured: %v", err)
			}
		})
		if after := (&testNetwork{t: t, backend: BackendNFT}).dump(); after != before {
			t.Errorf("something was changed:\n%s", after)
		}
	})
}
