package bpf

import (
	"net"
	"testing"
	"time"

	"github.com/podidentity/podidentity/internal/netnstest"
)

// accept starts a client in a pod, accepts its first connection, and leaves the client running.
func (n *testNode) accept(listener net.Listener, action string) net.Conn {
	n.t.Helper()
	client := n.client("pod", podCgroupName+"/"+testContainer, action)
	netnstest.OnThreadIn(n.t, "pod", func() {
		if err := client.Start(); err != nil {
			n.t.Error(err)
		}
	})
	n.t.Cleanup(func() { _ = client.Wait() })
	conn, err := listener.Accept()
	if err != nil {
		n.t.Fatal(err)
	}
	return conn
}

// A pod that can compute tokens of other pods from its own can open a connection with one of them. The numbers of
// bpf_get_prandom_u32, for example, are a linear function of 113 bits.
func TestTokensAreNoLinearFunctionOfEarlierTokens(t *testing.T) {
	onNode(t, func(n *testNode) {
		listener := n.installWithListener()
		conn := n.accept(listener, "many")
		var bits []bool
		for {
			token, err := tokenOf(conn)
			conn.Close()
			if err != nil {
				t.Fatal(err)
			}
			bits = append(bits, token&1 == 1)
			if len(bits) == manyTimes {
				break
			}
			if conn, err = listener.Accept(); err != nil {
				t.Fatal(err)
			}
		}
		// Half the number of bits, if they are random.
		if got := linearComplexity(bits); got < manyTimes/3 {
			t.Errorf("a linear function of %d bits computes the lowest bits of %d tokens", got, manyTimes)
		}
	})
}

// linearComplexity returns the length of the shortest linear feedback shift register that generates the bits, by the
// algorithm of Berlekamp and Massey.
func linearComplexity(bits []bool) (length int) {
	current, previous := make([]bool, len(bits)+1), make([]bool, len(bits)+1)
	current[0], previous[0] = true, true
	for n, shift := 0, 1; n < len(bits); n++ {
		wrong := bits[n]
		for i := 1; i <= length; i++ {
			wrong = wrong != (current[i] && bits[n-i])
		}
		if !wrong {
			shift++
			continue
		}
		before := append([]bool(nil), current...)
		for i := 0; i+shift < len(current); i++ {
			current[i+shift] = current[i+shift] != previous[i]
		}
		if 2*length <= n {
			length, previous, shift = n+1-length, before, 1
		} else {
			shift++
		}
	}
	return length
}

func TestAnOldRecordIdentifiesNobody(t *testing.T) {
	onNode(t, func(n *testNode) {
		listener := n.installWithListener()
		for _, c := range []struct {
			age        time.Duration
			identified bool
		}{{0, true}, {maxRecordAge - 20*time.Second, true}, {maxRecordAge + time.Second, false}} {
			conn := n.accept(listener, "connect")
			connections := n.capture.loaded.Maps[programsMapConnections]
			var token uint64
			var record programsConnectionRecord
			if !connections.Iterate().Next(&token, &record) {
				t.Fatal("there is no record of the connection")
			}
			record.Established -= uint64(c.age)
			if err := connections.Put(token, record); err != nil {
				t.Fatal(err)
			}
			if owner, err := n.capture.Owner(conn); (err == nil && owner.PodUID == testUID) != c.identified {
				t.Errorf("with a record of %s: %+v, %v; want identified: %v", c.age, owner, err, c.identified)
			}
			conn.Close()
		}
	})
}
