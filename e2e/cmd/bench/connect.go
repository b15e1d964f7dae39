package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/podidentity/e2e/cluster"
)

// connectRounds is how often each capture is measured.
const connectRounds = 5

// makePodCgroup creates the cgroup of the first pod on NMI's node, below a cgroup for all pods, and returns both.
func makePodCgroup(ctx context.Context, r *environment) (all, pod string, err error) {
	k, err := newClients(r.cluster)
	if err != nil {
		return "", "", err
	}
	first, err := k.kube.CoreV1().Pods(namespace).Get(ctx, podName(0), metav1.GetOptions{})
	if err != nil {
		return "", "", err
	}
	// The cgroups of a node of the cluster, which is removed with the cluster.
	if all, err = cluster.PodsCgroup(r.cluster.Nodes()[0]); err != nil {
		return "", "", err
	}
	all = filepath.Join(filepath.Dir(all), "bench")
	pod = filepath.Join(all, "pod"+string(first.UID))
	return all, pod, os.MkdirAll(pod, 0o755)
}

// compareConnections measures requests on new connections, captured by iptables and by cgroup in turn, and records the
// medians. The client is a process of its own: in the cgroup of a pod it is captured by cgroup, elsewhere by iptables.
func compareConnections(ctx context.Context, r *environment, results map[string]float64, round time.Duration) error {
	printLine("\ncached token on new connections, captured by iptables and by cgroup: %d workers, %d rounds of %s each\n", workers, connectRounds, round)
	printLine("%5s  %14s %8s %8s   %12s %8s %8s   %6s", "round", "iptables req/s", "p50", "p99", "cgroup req/s", "p50", "p99", "req/s")
	perSecond, p99 := map[string][]float64{}, map[string][]float64{}
	var ratios []float64
	for i := range connectRounds + 1 {
		rules, err := measureConnections(ctx, r, "", round)
		if err != nil {
			return fmt.Errorf("measuring connections that iptables captures: %w", err)
		}
		programs, err := measureConnections(ctx, r, r.podCgroup, round)
		if err != nil {
			return fmt.Errorf("measuring connections that are captured by cgroup: %w", err)
		}
		if i == 0 {
			continue // the first round is a warm-up and does not count
		}
		printLine("%5d  %14.0f %8s %8s   %12.0f %8s %8s   %6.2f", i, rules.perSecond, rules.p50, rules.p99, programs.perSecond, programs.p50, programs.p99, programs.perSecond/rules.perSecond)
		ratios = append(ratios, programs.perSecond/rules.perSecond)
		for capture, f := range map[string]figures{"iptables": rules, "bpf": programs} {
			perSecond[capture] = append(perSecond[capture], f.perSecond)
			p99[capture] = append(p99[capture], float64(f.p99.Microseconds()))
		}
	}
	for _, capture := range []string{"iptables", "bpf"} {
		results["nmi.connect."+capture+".rps"] = median(perSecond[capture])
		results["nmi.connect."+capture+".p99_us"] = median(p99[capture])
	}
	results["nmi.connect.rps_ratio"] = median(ratios)
	printLine("\nmedians: %.0f requests/s with iptables, %.0f by cgroup, %.2f times as many", results["nmi.connect.iptables.rps"], results["nmi.connect.bpf.rps"], median(ratios))
	return nil
}

// connectResult is what `bench connect` prints.
type connectResult struct {
	PerSecond float64       `json:"per_second"`
	P50       time.Duration `json:"p50"`
	P99       time.Duration `json:"p99"`
}

// measureConnections runs `bench connect` in the network namespace of the pods, and in the cgroup unless it is "".
func measureConnections(ctx context.Context, r *environment, cgroup string, round time.Duration) (m figures, err error) {
	self, err := os.Executable()
	if err != nil {
		return m, err
	}
	cmd := inNetns(ctx, r.nmi.podsNetns, self, "connect", strconv.Itoa(r.nmi.subnet), round.String())
	cmd.Stderr = os.Stderr
	if cgroup != "" {
		folder, err := os.Open(cgroup)
		if err != nil {
			return m, err
		}
		defer folder.Close()
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(folder.Fd())}
	}
	out, err := cmd.Output()
	if err != nil {
		return m, err
	}
	var got connectResult
	if err := json.Unmarshal(out, &got); err != nil {
		return m, fmt.Errorf("the output of bench connect: %w: %.200q", err, out)
	}
	return figures{got.PerSecond, got.P50, got.P99}, nil
}

// connect requests tokens from the current network namespace for the length of a round, each on a new connection, and prints
// a connectResult.
func connect(args []string) error {
	if len(args) != 2 {
		return errors.New("usage: bench connect SUBNET DURATION")
	}
	subnet, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	round, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	f, err := measureWorkers(context.Background(), round, func(i int) *client { return connectingClient(podIP(subnet, i)) })
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(connectResult{f.perSecond, f.p50, f.p99})
}

// connectingClient returns a client that opens a connection from the address for each request, and resets it: a closed
// connection keeps its port for a minute.
func connectingClient(address string) *client {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
	dial := func(ctx context.Context, network, target string) (net.Conn, error) {
		conn, err := dialer.DialContext(ctx, network, target)
		if err != nil {
			return nil, err
		}
		return conn, conn.(*net.TCPConn).SetLinger(0)
	}
	return &client{&http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true, DisableCompression: true}}}
}
