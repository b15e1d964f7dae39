package nmi

import (
	"errors"
	"strings"
	"testing"

	"github.com/podidentity/podidentity/nmi/request"
)

func TestTheCaptureIsChosenByTheFlagAndWhatTheNodeCanHave(t *testing.T) {
	noBPF, noIPTables := errors.New("no bpffs"), errors.New("no iptables")
	both, onlyIPTables, onlyBPF := captureKinds{true, true}, captureKinds{iptables: true}, captureKinds{bpf: true}
	for _, c := range []struct {
		flag            string
		bpf, iptables   error
		hostNetwork     string
		podVerification request.PodVerification
		want            captureKinds
		err             string
	}{
		{flag: CaptureAuto, want: both},
		{flag: CaptureAuto, bpf: noBPF, want: onlyIPTables},
		{flag: CaptureAuto, iptables: noIPTables, want: onlyBPF},
		{flag: CaptureAuto, bpf: noBPF, iptables: noIPTables, err: "no iptables; no bpffs"},
		{flag: CaptureIPTables, want: onlyIPTables},
		{flag: CaptureIPTables, iptables: noIPTables, err: "--capture=iptables is not possible on this node: no iptables"},
		{flag: CaptureBPF, iptables: noIPTables, want: onlyBPF},
		{flag: CaptureBPF, bpf: noBPF, err: "--capture=bpf is not possible on this node: no bpffs"},
		{flag: CaptureBoth, want: both},
		{flag: CaptureBoth, bpf: noBPF, err: "no bpffs"},
		{flag: CaptureBoth, iptables: noIPTables, err: "no iptables"},
		{flag: CaptureAuto, bpf: noBPF, hostNetwork: HostNetworkBound, err: "--capture-host-network=bound"},
		{flag: CaptureAuto, iptables: noIPTables, hostNetwork: HostNetworkAll, want: onlyBPF},
		{flag: CaptureAuto, bpf: noBPF, podVerification: request.VerifyRequired, err: "--pod-verification=required"},
		{flag: CaptureAuto, bpf: noBPF, podVerification: request.VerifyOff, want: onlyIPTables},
	} {
		cfg := Config{CaptureBy: c.flag, CaptureHostNetwork: c.hostNetwork, PodVerification: string(c.podVerification)}
		if cfg.CaptureHostNetwork == "" {
			cfg.CaptureHostNetwork = HostNetworkNone
		}
		got, err := chooseCaptures(cfg, c.bpf, c.iptables)
		switch {
		case c.err == "" && (err != nil || got != c.want):
			t.Errorf("%+v: got %+v, %v", c, got, err)
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
			t.Errorf("%+v: got %v", c, err)
		}
	}
}
