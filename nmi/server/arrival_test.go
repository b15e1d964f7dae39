package server

import (
	"net"
	"net/netip"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/podidentity/podidentity/internal/netnstest"
)

// The interface is the same whether or not netfilter redirected the connection. For a port of a bridge it is the bridge.
func TestAConnectionTellsOnWhichInterfaceItWasOpened(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		netnstest.Run(t, "mount", "-t", "tmpfs", "tmpfs", "/run")
		netnstest.Run(t, "sh", "-e", "-c", `
ip link set lo up
for ns in routed bridged; do
	ip netns add $ns
	ip link add $ns type veth peer name eth0 netns $ns
	ip link set $ns up
	ip -n $ns link set eth0 up
done
ip link add br0 type bridge
ip addr add 10.77.1.1/24 dev br0
ip link set br0 up
ip link set bridged master br0
ip addr add 10.78.1.1/24 dev routed
ip -n bridged addr add 10.77.1.2/24 dev eth0
ip -n bridged route add default via 10.77.1.1
ip -n routed addr add 10.78.1.2/24 dev eth0
ip -n routed route add default via 10.78.1.1
iptables-nft -t nat -A PREROUTING -d 192.0.2.1 -p tcp --dport 80 -j DNAT --to-destination 10.77.1.1:2579`)
		inner, err := listenForPods(t.Context(), netip.MustParseAddrPort("10.77.1.1:2579"), "", socketOption{unix.SOL_IP, unix.IP_PKTINFO})
		if err != nil {
			t.Fatal(err)
		}
		defer inner.Close()
		l := &limitedListener{Listener: inner, limiter: newConnectionLimiter(), refused: prometheus.NewCounter(prometheus.CounterOpts{Name: "x"})}
		for namespace, name := range map[string]string{"routed": "routed", "bridged": "br0"} {
			want, err := net.InterfaceByName(name)
			if err != nil {
				t.Fatal(err)
			}
			for _, to := range []string{"10.77.1.1:2579", "192.0.2.1:80"} {
				netnstest.OnThreadIn(t, namespace, func() {
					conn, err := net.Dial("tcp4", to)
					if err != nil {
						t.Error(err)
						return
					}
					t.Cleanup(func() { conn.Close() })
				})
				conn, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				if got := conn.(*limitedConn).caller.Interface; got != want.Index {
					t.Errorf("%s to %s: interface %d, want %d", namespace, to, got, want.Index)
				}
				conn.Close()
			}
		}
	})
}
