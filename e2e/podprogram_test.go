package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// podProgram is the environment variable with the name of one of podPrograms and its arguments. If it is set, the test
// binary runs that program. A test starts it in the network and in the cgroup of a pod.
const podProgram = "PODIDENTITY_E2E_PROGRAM"

var podPrograms = map[string]func(args []string) error{"hold": hold, "load": requestTokens, "proxy": proxy, "raw": sendRaw}

// runPodProgram runs the program and returns its exit status.
func runPodProgram(command string) int {
	args := strings.Fields(command)
	if err := podPrograms[args[0]](args[1:]); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// program returns a command that runs one of podPrograms in the pod.
func program(s *testNamespace, pod, command string) *exec.Cmd {
	s.t.Helper()
	self, err := os.Executable()
	must(s.t, err)
	cmd, err := testCluster.InPodCommand(s.t.Context(), s.name, pod, self)
	must(s.t, err)
	cmd.Env = append(os.Environ(), podProgram+"="+command)
	return cmd
}

// hold connects to IMDS and prints the status of a request. After a line on standard input it sends the request again on
// the same connection.
func hold([]string) error {
	conn, err := net.Dial("tcp4", "169.254.169.254:80")
	if err != nil {
		return err
	}
	in, responses := bufio.NewReader(os.Stdin), bufio.NewReader(conn)
	for {
		_, err := io.WriteString(conn, "GET /metadata/versions HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\n\r\n")
		if err == nil {
			err = conn.SetReadDeadline(time.Now().Add(3 * time.Second))
		}
		if err != nil {
			return err
		}
		response, err := http.ReadResponse(responses, nil)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, response.Body); err != nil {
			return err
		}
		fmt.Println(response.Status)
		if _, err := in.ReadString('\n'); err != nil {
			return err
		}
	}
}

// requestTokens requests tokens, each on a new connection, with four workers, until standard input ends. It prints a line for
// each request: the status (0 if there is no response) and the body.
func requestTokens([]string) error {
	var lines sync.Mutex
	dial := withoutTimeWait((&net.Dialer{}).DialContext)
	for range 4 {
		client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
		go func() {
			for {
				status, body := get(context.Background(), client, askVault)
				lines.Lock()
				fmt.Println(status, strings.ReplaceAll(body, "\n", " "))
				lines.Unlock()
				if status == 0 {
					time.Sleep(5 * time.Millisecond) // no busy loop while nothing listens
				}
			}
		}()
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// startPodLoad starts requestTokens in the pod. In contrast to startLoad, its connections are those of a process of the pod.
func startPodLoad(s *testNamespace, pod string) *load {
	s.t.Helper()
	cmd := program(s, pod, "load")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	must(s.t, err)
	out, err := cmd.StdoutPipe()
	must(s.t, err)
	must(s.t, cmd.Start())
	l := &load{statuses: map[int]int{}, tokens: map[string]int{}, lastToken: time.Now(), cancel: func() { in.Close() }}
	l.workers.Go(func() {
		lines := bufio.NewReader(out)
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				break
			}
			code, body, _ := strings.Cut(strings.TrimSpace(line), " ")
			status, _ := strconv.Atoi(code)
			l.record(status, body)
		}
		_ = cmd.Wait()
	})
	s.t.Cleanup(l.stop)
	return l
}

// proxy is what a service mesh runs in a pod: it accepts connections that a rule of the pod's own network namespace
// redirects to 127.0.0.1:15001, and connects to the address that the client dialed. It runs as user 1337, whose connections
// the rule does not redirect.
func proxy([]string) error {
	listener, err := net.Listen("tcp4", "127.0.0.1:15001")
	if err != nil {
		return err
	}
	if err := unix.Setuid(1337); err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		client, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer client.Close()
			address, err := originalDestination(client.(*net.TCPConn))
			if err != nil {
				fmt.Println(err)
				return
			}
			server, err := net.Dial("tcp4", address.String())
			if err != nil {
				fmt.Println(err)
				return
			}
			defer server.Close()
			fmt.Println("proxied to", address)
			go func() { _, _ = io.Copy(server, client) }()
			_, _ = io.Copy(client, server)
		}()
	}
}

func originalDestination(conn *net.TCPConn) (netip.AddrPort, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var address unix.RawSockaddrInet4
	var errno unix.Errno
	err = raw.Control(func(fd uintptr) {
		size := uint32(unsafe.Sizeof(address))
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_IP, unix.SO_ORIGINAL_DST, uintptr(unsafe.Pointer(&address)), uintptr(unsafe.Pointer(&size)), 0)
	})
	if err == nil && errno != 0 {
		err = errno
	}
	port := (*[2]byte)(unsafe.Pointer(&address.Port))
	return netip.AddrPortFrom(netip.AddrFrom4(address.Addr), uint16(port[0])<<8|uint16(port[1])), err
}

// sendRaw sends a UDP datagram and a TCP segment to the metadata address by a raw socket, and returns an error unless both
// fail with EPERM.
func sendRaw([]string) error {
	var problems []error
	for _, protocol := range []int{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, protocol)
		if err != nil {
			return err
		}
		err = unix.Sendto(fd, make([]byte, 20), 0, &unix.SockaddrInet4{Addr: [4]byte{169, 254, 169, 254}})
		if !errors.Is(err, unix.EPERM) {
			problems = append(problems, fmt.Errorf("protocol %s: %v", strconv.Itoa(protocol), err))
		}
	}
	return errors.Join(problems...)
}

// firstLine starts a program and returns its first line, and the rest of what it prints.
func firstLine(t *testing.T, cmd *exec.Cmd) (string, *bufio.Reader) {
	t.Helper()
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	reader := bufio.NewReader(out)
	line, err := reader.ReadString('\n')
	must(t, err)
	return strings.TrimSpace(line), reader
}
