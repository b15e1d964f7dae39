package bpf

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// clientAction is the environment variable that makes the test program a client: a process of its own, because a test
// starts it in the cgroup of a pod. It has the name of a function of clients.
const clientAction = "PODIDENTITY_TEST_CLIENT"

func TestMain(m *testing.M) {
	action := os.Getenv(clientAction)
	if action == "" {
		os.Exit(m.Run())
	}
	result, err := clients[action]()
	if err != nil {
		result = describe(err)
	}
	fmt.Print(result)
}

// describe returns the system error in err, for example EPERM.
func describe(err error) string {
	var errno unix.Errno
	var timeout net.Error
	switch {
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	}
	return err.Error()
}

// clientTimeout is how long a client waits for a response. Some tests expect none.
const clientTimeout = time.Second

// clients are what a client can do. Each returns the greeting of the server, or what the test wants to know.
var clients = map[string]func() (string, error){
	"connect":        func() (string, error) { return greeting(net.Dial("tcp4", testMetadata.String())) },
	"connect mapped": func() (string, error) { return connectMapped() },
	"peer": func() (string, error) {
		conn, err := net.Dial("tcp4", testMetadata.String())
		if err != nil {
			return "", err
		}
		return conn.RemoteAddr().String(), nil
	},
	"peer mapped":              peerMapped,
	"from 40000":               func() (string, error) { return greeting(dialFrom(40000)) },
	"from 40001":               func() (string, error) { return greeting(dialFrom(40001)) },
	"listener":                 func() (string, error) { return greeting(net.Dial("tcp4", testListen.String())) },
	"other port":               func() (string, error) { return greeting(net.Dial("tcp4", testMetadata.Addr().String()+":81")) },
	"udp connect":              func() (string, error) { return "", dialOnly("udp4", testMetadata.String()) },
	"udp sendto":               func() (string, error) { return "", sendTo(unix.AF_INET) },
	"udp mapped":               func() (string, error) { return "", sendTo(unix.AF_INET6) },
	"raw":                      func() (string, error) { return "", sendRaw() },
	"ping":                     func() (string, error) { return "", sendPing() },
	"fast open":                fastOpen,
	"multipath":                multipath,
	"other port of the server": func() (string, error) { return greeting(net.Dial("tcp4", "10.88.0.1:81")) },
	"other server":             func() (string, error) { return greeting(net.Dial("tcp4", "10.88.0.1:80")) },
	"wait":                     waitForSignal,
	"many":                     connectManyTimes,
}

const manyTimes = 600

// connectManyTimes connects on one CPU.
func connectManyTimes() (string, error) {
	runtime.LockOSThread()
	var cpus, first unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		return "", err
	}
	for cpu := range len(cpus) * 64 {
		if cpus.IsSet(cpu) {
			first.Set(cpu)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &first); err != nil {
		return "", err
	}
	for range manyTimes {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(fd, metadataAddress())
		}
		if err = errors.Join(err, unix.Close(fd)); err != nil {
			return "", err
		}
	}
	return "", nil
}

// dialFrom connects to NMI from the address of the pod.
func dialFrom(port int) (net.Conn, error) {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 77, 1, 2), Port: port}}
	return dialer.Dial("tcp4", testListen.String())
}

func dialOnly(network, address string) error {
	conn, err := net.Dial(network, address)
	if err == nil {
		conn.Close()
	}
	return err
}

// greeting returns the line that the server sends.
func greeting(conn net.Conn, err error) (string, error) {
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(clientTimeout)); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(line), err
}

// mapped returns the metadata address in IPv6 form.
func mapped() *unix.SockaddrInet6 {
	a := &unix.SockaddrInet6{Port: int(testMetadata.Port())}
	copy(a.Addr[10:], []byte{0xff, 0xff})
	ip := testMetadata.Addr().As4()
	copy(a.Addr[12:], ip[:])
	return a
}

func metadataAddress() *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Port: int(testMetadata.Port()), Addr: testMetadata.Addr().As4()}
}

func openMapped() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "socket"), unix.Connect(fd, mapped())
}

func connectMapped() (string, error) {
	file, err := openMapped()
	if err != nil {
		return "", err
	}
	return greeting(net.FileConn(file))
}

func peerMapped() (string, error) {
	file, err := openMapped()
	if err != nil {
		return "", err
	}
	peer, err := unix.Getpeername(int(file.Fd()))
	if err != nil {
		return "", err
	}
	a := peer.(*unix.SockaddrInet6)
	return net.JoinHostPort(net.IP(a.Addr[:]).String(), fmt.Sprint(a.Port)), nil
}

// sendTo sends a datagram with a socket that is not connected.
func sendTo(family int) error {
	fd, err := unix.Socket(family, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	var to unix.Sockaddr = metadataAddress()
	if family == unix.AF_INET6 {
		to = mapped()
	}
	return unix.Sendto(fd, []byte("x"), 0, to)
}

func sendRaw() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_UDP)
	if err != nil {
		return err
	}
	return unix.Sendto(fd, make([]byte, 8), 0, &unix.SockaddrInet4{Addr: testMetadata.Addr().As4()})
}

func sendPing() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
	if err != nil {
		return err
	}
	return unix.Sendto(fd, []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0}, 0, &unix.SockaddrInet4{Addr: testMetadata.Addr().As4()})
}

// fastOpen connects with sendto instead of connect.
func fastOpen() (string, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return "", err
	}
	if err := unix.Sendto(fd, []byte("x"), unix.MSG_FASTOPEN, metadataAddress()); err != nil {
		return "", err
	}
	return greeting(net.FileConn(os.NewFile(uintptr(fd), "socket")))
}

// multipath connects with Multipath TCP.
func multipath() (string, error) {
	dialer := net.Dialer{Timeout: clientTimeout}
	dialer.SetMultipathTCP(true)
	return greeting(dialer.Dial("tcp4", testMetadata.String()))
}

// waitForSignal connects, prints the greeting, and after a line on standard input sends a byte and returns what the
// server then sends.
func waitForSignal() (string, error) {
	conn, err := net.Dial("tcp4", testMetadata.String())
	if err != nil {
		return "", err
	}
	reader := bufio.NewReader(conn)
	line, err := reader.ReadString('\n')
	if err != nil {
		return "", err
	}
	fmt.Print(line)
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return "", err
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		return "", err
	}
	if err := conn.SetReadDeadline(time.Now().Add(clientTimeout)); err != nil {
		return "", err
	}
	line, err = reader.ReadString('\n')
	return strings.TrimSpace(line), err
}
