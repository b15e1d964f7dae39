package iptables

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/podidentity/podidentity/internal/netnstest"
	"github.com/podidentity/podidentity/internal/nodelink"
)

func TestADeletedLinkIsRepairedWithoutRestartingTheListener(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		w.install()
		for _, damage := range []string{
			"ip link del " + nodelink.Name,
			"ip addr del 169.254.25.79/32 dev " + nodelink.Name,
			"ip link set " + nodelink.Name + " down",
			"ip addr add 169.254.25.99/32 dev " + nodelink.Name,
		} {
			netnstest.Run(t, "sh", "-c", damage)
			if err := w.capture.Verify(context.Background()); !errors.Is(err, ErrDrift) || !strings.Contains(err.Error(), "link: ") {
				t.Errorf("%s: Verify: %v", damage, err)
			}
			if repaired := w.sync(); !slices.Equal(repaired, []string{"link"}) {
				t.Errorf("%s: Sync repaired %v", damage, repaired)
			}
			w.verify()
			// The listener was bound before the damage, and was not restarted.
			w.wantGreeting("pod", "169.254.169.254:80", "nmi "+podIP)
		}
	})
}

func TestTheListenAddressIsNotTheSourceOfOtherTraffic(t *testing.T) {
	onBothBackends(t, func(t *testing.T, w *testNetwork) {
		w.install()
		// The destination is link-local, like the listen address, but it is on another link.
		netnstest.Run(t, "ip", "route", "add", "169.254.77.1/32", "dev", "out0", "scope", "link")
		if route := netnstest.Run(t, "ip", "route", "get", "169.254.77.1"); !strings.Contains(route, "src "+nodeIP) {
			t.Errorf("the source address of other traffic is not that of the node: %s", route)
		}
	})
}

func TestAForeignLinkOrAddressIsRefused(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		buildNetwork(t)
		c, err := New(testConfig(BackendNFT))
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct{ name, make, undo string }{
			{"another kind", "ip link add podidentity0 type veth peer name x0", "ip link del podidentity0"},
			{"a bridge with ports", "ip link add podidentity0 type bridge; ip link add x0 type veth peer name x1; ip link set x0 master podidentity0", "ip link del podidentity0; ip link del x0"},
		} {
			netnstest.Run(t, "sh", "-e", "-c", tt.make)
			before := links(t)
			_, syncErr := c.Sync(context.Background())
			for doing, err := range map[string]error{"EnsureLink": c.EnsureLink(context.Background()), "Sync": syncErr, "Verify": c.Verify(context.Background()), "Uninstall": c.Uninstall(context.Background())} {
				if !errors.Is(err, nodelink.ErrForeign) {
					t.Errorf("%s: %s: %v", tt.name, doing, err)
				}
			}
			if after := links(t); after != before {
				t.Errorf("%s: links are now\n%s\nwere\n%s", tt.name, after, before)
			}
			netnstest.Run(t, "sh", "-e", "-c", tt.undo)
		}
		netnstest.Run(t, "ip", "addr", "add", "169.254.25.79/32", "dev", "out0")
		if err := c.EnsureLink(context.Background()); !errors.Is(err, nodelink.ErrForeign) {
			t.Errorf("the address of another link: %v", err)
		}
	})
}

func TestEnsureLinkIsIdempotentAndHasOneAddress(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		buildNetwork(t)
		c, err := New(testConfig(BackendNFT))
		if err != nil {
			t.Fatal(err)
		}
		var first string
		for i := range 3 {
			if err := c.EnsureLink(context.Background()); err != nil {
				t.Fatal(err)
			}
			now := netnstest.Run(t, "ip", "-o", "-4", "addr", "show", "dev", nodelink.Name)
			if i == 0 {
				first = now
			}
			if now != first || strings.Count(now, "inet ") != 1 || !strings.Contains(now, "169.254.25.79/32") || !strings.Contains(now, "scope link") {
				t.Errorf("the link must have the listen address with scope link and no other address, and EnsureLink must not change that: %s", now)
			}
		}
	})
}
