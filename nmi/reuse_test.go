package nmi

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/bpf"
	"github.com/podidentity/podidentity/internal/netnstest"
	"github.com/podidentity/podidentity/internal/nodelink"
	"github.com/podidentity/podidentity/nmi/nmitest"
	"github.com/podidentity/podidentity/nmi/request"
	"github.com/podidentity/podidentity/nmi/server"
)

// Environment variables of TestAnAddressThatMovesBetweenPods, which runs in a child process. make bench-reuse sets the first
// two.
const (
	reuseRounds = "PODIDENTITY_REUSE_ROUNDS"      // how often the address moves
	reuseResult = "PODIDENTITY_REUSE_RESULT"      // the file for the figures of bench.json; none if it is empty
	reuseClient = "PODIDENTITY_TEST_REUSE_CLIENT" // makes the test program a client; the address of the metadata service
)

func TestMain(m *testing.M) {
	if metadata := os.Getenv(reuseClient); metadata != "" {
		runReuseClient(metadata)
		return
	}
	os.Exit(m.Run())
}

// runReuseClient requests a token for each line on standard input, from the port that the line names. It prints one line:
// the token, or the reason of the refusal, or the error.
func runReuseClient(metadata string) {
	for ports := bufio.NewScanner(os.Stdin); ports.Scan(); {
		port, _ := strconv.Atoi(ports.Text())
		text, err := requestFrom(port, metadata)
		if err != nil {
			text = "error: " + err.Error()
		}
		fmt.Println(text)
	}
}

// requestFrom requests a token over a new connection, which it resets afterwards: the next connection may have the same
// port.
func requestFrom(port int, metadata string) (string, error) {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{Port: port}, Timeout: 5 * time.Second}
	conn, err := dialer.Dial("tcp4", metadata)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	err = conn.(*net.TCPConn).SetLinger(0)
	if err == nil {
		err = conn.SetDeadline(time.Now().Add(10 * time.Second))
	}
	if err == nil {
		_, err = io.WriteString(conn, "GET "+nmitest.TokenPath+" HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\n\r\n")
	}
	if err != nil {
		return "", err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "", err
	}
	var body struct {
		AccessToken string `json:"access_token"`
		Reason      string
	}
	if err := json.NewDecoder(response.Body).Decode(&body); err != nil {
		return "", err
	}
	if body.AccessToken != "" {
		return body.AccessToken, nil
	}
	return "refused: " + body.Reason, nil
}

// reusePod is a pod with a network namespace and a cgroup of its own.
type reusePod struct {
	uid, token string
	link       int // index of the node's end of its link
	in         io.Writer
	out        *bufio.Scanner
}

// reuseNode is a node with two pods that have the same address in turn.
type reuseNode struct {
	*testNode
	address netip.Addr
	pods    [2]*reusePod
	events  [2]chan *corev1.Pod // of each pod, in order
}

const reuseNetwork = `
mount -t tmpfs tmpfs /run
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
mac() { sed 's/.*ether \([^ ]*\).*/\1/'; }
for i in 0 1; do
  ip netns add pod$i
  ip link add link$i type veth peer name eth0 netns pod$i
  ip addr add 10.77.1.1/32 dev link$i
  ip link set link$i up
  ip -n pod$i link set lo up
  ip -n pod$i addr add 10.77.1.2/32 dev eth0
  ip -n pod$i link set eth0 up
  ip -n pod$i route add 10.77.1.1 dev eth0 scope link
  ip -n pod$i route add default via 10.77.1.1
  # The address is behind both links, one after the other. Without these entries the kernel would search for it each time.
  ip neigh add 10.77.1.2 lladdr $(ip -n pod$i -o link show eth0 | mac) dev link$i nud permanent
  ip -n pod$i neigh add 10.77.1.1 lladdr $(ip -o link show link$i | mac) dev eth0 nud permanent
done
`

func newReuseNode(t *testing.T, verification request.PodVerification) *reuseNode {
	t.Helper()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	netnstest.Run(t, "sh", "-e", "-c", reuseNetwork)
	n := &reuseNode{address: netip.MustParseAddr("10.77.1.2")}
	cgroup := reuseCgroup(t)
	clients := [2]string{nmitest.ClientX, nmitest.ClientY}
	var objects []object
	for i := range n.pods {
		uid, name := fmt.Sprintf("0000000%d-0000-4000-8000-000000000000", i), fmt.Sprintf("p%d", i)
		n.pods[i] = &reusePod{uid: uid, token: "token-of-" + clients[i]}
		objects = append(objects, n.pod(i, true), azureIdentity("a", name, clients[i]), binding("a", name, name))
	}
	n.testNode = startTestNode(t, newFakeAPI(t, objects...), func(cfg *Config) {
		cfg.OperationMode, cfg.PodVerification = ModeManaged, string(verification)
		cfg.CaptureBy, cfg.PodsCgroup, cfg.PodLookupTimeout = CaptureBPF, cgroup, 100*time.Millisecond
	})
	n.requests.Cluster = n.objects // nobody receives from n.checks
	n.serve()
	for i := range n.pods {
		n.startClient(i, cgroup)
		n.deliver(i)
	}
	return n
}

func reuseCgroup(t *testing.T) string {
	t.Helper()
	mount := "/sys/fs/cgroup"
	if _, err := os.Stat(mount + "/unified"); err == nil {
		mount += "/unified"
	}
	top := filepath.Join(mount, fmt.Sprintf("podidentity-reuse-%d", os.Getpid()))
	root := filepath.Join(top, "kubepods")
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeCgroup(t, top) })
	t.Cleanup(func() { removeCgroup(t, root) })
	return root
}

// removeCgroup waits until the cgroup can be removed, which is a moment after its last process has ended.
func removeCgroup(t *testing.T, path string) {
	err := unix.Rmdir(path)
	for deadline := time.Now().Add(5 * time.Second); errors.Is(err, unix.EBUSY) && time.Now().Before(deadline); err = unix.Rmdir(path) {
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Errorf("removing the cgroup %s: %v", path, err)
	}
}

// pod returns the state of a pod that the API server reports: with the address, or with none.
func (n *reuseNode) pod(i int, withAddress bool) *corev1.Pod {
	address, name := "", fmt.Sprintf("p%d", i)
	if withAddress {
		address = n.address.String()
	}
	return podIn("a", name, n.pods[i].uid, address, name)
}

// serve captures by cgroup and serves the pods.
func (n *reuseNode) serve() {
	n.t.Helper()
	var err error
	if n.capture, err = newCapture(n.cfg, false, n.logs.Main); err != nil {
		n.t.Fatal(err)
	}
	listeners, err := server.Listen(n.t.Context(), n.serverConfig(), n.capture.ensureLink)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(listeners.Close)
	pods := n.newServer()
	pods.Start(listeners, http.NotFoundHandler())
	n.t.Cleanup(func() { _ = pods.Close() })
	if err := n.capture.install(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		if err := bpf.Uninstall(context.Background(), n.cfg.pinDir()); err != nil {
			n.t.Error(err)
		}
		if err := (nodelink.Link{Address: n.cfg.listen().Addr()}).Remove(); err != nil {
			n.t.Error(err)
		}
	})
}

// startClient starts the client of a pod in its network namespace and its cgroup.
func (n *reuseNode) startClient(i int, cgroup string) {
	n.t.Helper()
	path := filepath.Join(cgroup, "pod"+n.pods[i].uid)
	if err := os.Mkdir(path, 0o755); err != nil {
		n.t.Fatal(err)
	}
	folder, err := os.Open(path)
	if err != nil {
		n.t.Fatal(err)
	}
	defer folder.Close()
	link, err := netlink.LinkByName(fmt.Sprintf("link%d", i))
	if err != nil {
		n.t.Fatal(err)
	}
	n.pods[i].link = link.Attrs().Index
	cmd := exec.Command("/proc/self/exe")
	cmd.Env, cmd.Stderr = append(os.Environ(), reuseClient+"="+n.cfg.imds().String()), os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(folder.Fd())}
	in, inErr := cmd.StdinPipe()
	out, outErr := cmd.StdoutPipe()
	if inErr != nil || outErr != nil {
		n.t.Fatal(inErr, outErr)
	}
	n.pods[i].in, n.pods[i].out = in, bufio.NewScanner(out)
	netnstest.OnThreadIn(n.t, fmt.Sprintf("pod%d", i), func() { err = cmd.Start() })
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
		removeCgroup(n.t, path)
	})
}

// deliver makes the API server report the states of a pod that n.events receives, each 0 to 3 s late. The order stays.
func (n *reuseNode) deliver(i int) {
	type report struct {
		at  time.Time
		pod *corev1.Pod
	}
	reports := make(chan report, 100_000)
	n.events[i] = make(chan *corev1.Pod)
	go func() {
		defer close(reports)
		for pod := range n.events[i] {
			reports <- report{time.Now().Add(rand.N(3 * time.Second)), pod}
		}
	}()
	go func() {
		for r := range reports {
			select {
			case <-time.After(time.Until(r.at)):
				n.api.set(r.pod)
			case <-n.t.Context().Done():
			}
		}
	}()
	n.t.Cleanup(func() { close(n.events[i]) })
}

// move gives the address to a pod.
func (n *reuseNode) move(i int) {
	n.t.Helper()
	route := &netlink.Route{LinkIndex: n.pods[i].link, Scope: netlink.SCOPE_LINK, Dst: netlink.NewIPNet(n.address.AsSlice())}
	if err := netlink.RouteReplace(route); err != nil {
		n.t.Fatal(err)
	}
	n.events[1-i] <- n.pod(1-i, false)
	n.events[i] <- n.pod(i, true)
}

// ask lets the pod request a token from the port, and returns what it got.
func (n *reuseNode) ask(i, port int) string {
	n.t.Helper()
	fmt.Fprintln(n.pods[i].in, port)
	if !n.pods[i].out.Scan() {
		n.t.Fatalf("the client of pod %d has ended: %v", i, n.pods[i].out.Err())
	}
	return n.pods[i].out.Text()
}

// reuseCounts are the results of the requests.
type reuseCounts struct{ rounds, own, wrong, refused, failed int }

func (n *reuseNode) run(rounds int) (counts reuseCounts) {
	n.t.Helper()
	for range rounds {
		i := rand.IntN(2)
		n.move(i)
		counts.rounds++
		switch got := n.ask(i, 40000+rand.IntN(8)); {
		case got == n.pods[i].token:
			counts.own++
		case got == n.pods[1-i].token:
			counts.wrong++
		case strings.HasPrefix(got, "refused: "):
			counts.refused++
		default:
			if counts.failed++; counts.failed < 5 {
				n.t.Log(got)
			}
		}
	}
	return counts
}

// The pods have the same address in turn, and the same ports. What the API server reports is up to three seconds old.
func TestAnAddressThatMovesBetweenPods(t *testing.T) {
	rounds := 20_000
	if text := os.Getenv(reuseRounds); text != "" {
		var err error
		if rounds, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("by cgroup", func(t *testing.T) {
		netnstest.RunIsolated(t, func(t *testing.T) {
			got := newReuseNode(t, request.VerifyAuto).run(rounds)
			t.Logf("%+v", got)
			if got.own != rounds {
				t.Errorf("%+v; want only own tokens", got)
			}
			if err := writeReuseResult(got); err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("by address", func(t *testing.T) {
		netnstest.RunIsolated(t, func(t *testing.T) {
			got := newReuseNode(t, request.VerifyOff).run(200)
			t.Logf("%+v", got)
			if got.wrong == 0 {
				t.Errorf("%+v; want tokens of the other pod: this test proves nothing", got)
			}
		})
	})
}

// writeReuseResult adds the figures to the file, which has the form of bench.json.
func writeReuseResult(got reuseCounts) error {
	file := os.Getenv(reuseResult)
	if file == "" {
		return nil
	}
	figures := map[string]float64{}
	text, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(text, &figures)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	figures["nmi.reuse.rounds"], figures["nmi.reuse.wrong"] = float64(got.rounds), float64(got.wrong)
	if text, err = json.MarshalIndent(figures, "", "  "); err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}
