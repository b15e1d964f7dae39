package cluster

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/podidentity/nmi/links"
	"github.com/podidentity/podidentity/nmi/nmitest"
)

func TestTheNewestStartOfAContainerIsKept(t *testing.T) {
	at := func(second int) metav1.Time { return metav1.NewTime(time.Unix(int64(1000+second), 0)) }
	running := func(second int) corev1.ContainerStatus {
		return corev1.ContainerStatus{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: at(second)}}}
	}
	terminated := func(second int) corev1.ContainerState {
		return corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{StartedAt: at(second)}}
	}
	waiting := corev1.ContainerStatus{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{}}}
	for _, c := range []struct {
		name   string
		status corev1.PodStatus
		want   int // 0: none
	}{
		{"none", corev1.PodStatus{}, 0},
		{"waiting", corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{waiting}}, 0},
		{"running", corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{running(5), running(7), running(6)}}, 7},
		{"terminated", corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{State: terminated(8)}, running(3)}}, 8},
		{"crashed", corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{State: waiting.State, LastTerminationState: terminated(9)}}}, 9},
		{"init container", corev1.PodStatus{InitContainerStatuses: []corev1.ContainerStatus{running(4)}, ContainerStatuses: []corev1.ContainerStatus{waiting}}, 4},
		{"ephemeral container", corev1.PodStatus{EphemeralContainerStatuses: []corev1.ContainerStatus{running(12)}, ContainerStatuses: []corev1.ContainerStatus{running(4)}}, 12},
	} {
		pod := nmitest.With(nmitest.Pod("a", "1", "10.0.0.1"), func(p *corev1.Pod) {
			c.status.PodIPs, c.status.StartTime = p.Status.PodIPs, new(at(1))
			p.Status = c.status
		})
		for range 2 { // the informer may trim a pod twice
			if _, err := trim(pod); err != nil {
				t.Fatal(err)
			}
			claim := Claim(netip.MustParseAddr("10.0.0.1"), pod, time.Time{})
			if c.want == 0 && !claim.Started.IsZero() || c.want != 0 && !claim.Started.Equal(at(c.want).Time) || !claim.Acknowledged.Equal(at(1).Time) {
				t.Errorf("%s: %+v", c.name, claim)
			}
			if len(pod.Status.ContainerStatuses) > 1 || pod.Status.InitContainerStatuses != nil || pod.Status.EphemeralContainerStatuses != nil {
				t.Errorf("%s: the pod keeps %+v", c.name, pod.Status)
			}
		}
	}
}

// The kubelet acknowledges a static pod again when it restarts.
func TestAStaticPodMayBeOlderThanItsAcknowledgement(t *testing.T) {
	pod := nmitest.With(nmitest.Pod("a", "1", "10.0.0.1"), func(p *corev1.Pod) {
		p.Annotations = map[string]string{configHash: "x", configMirror: "x"}
		p.Status.StartTime = new(metav1.Now())
	})
	if claim := Claim(netip.MustParseAddr("10.0.0.1"), pod, time.Time{}); !claim.Acknowledged.IsZero() {
		t.Errorf("%+v", claim)
	}
}

// confirmer refuses until a list started at a time, and until a time; zero: for ever.
type confirmer struct {
	cause         links.Cause
	listAt, until time.Time
}

func (c *confirmer) Confirm(claim links.Claim) *links.Unconfirmed {
	if c.cause == "" || !c.until.IsZero() && !time.Now().Before(c.until) || !c.listAt.IsZero() && !claim.Read.IsZero() && !claim.Read.Before(c.listAt) {
		return nil
	}
	return &links.Unconfirmed{Cause: c.cause, ListAt: c.listAt}
}

func TestARequestWaitsUntilItsAddressIsConfirmed(t *testing.T) {
	address := netip.MustParseAddr("10.0.0.1")
	for _, c := range []struct {
		name   string
		refuse confirmer
		after  time.Duration // the confirmer has changed then
		listAt time.Duration // a list confirms from then on
		want   time.Duration // 0: refused
		lists  int32
	}{
		{"at once", confirmer{}, 0, 0, 1, 0},
		{"the links changed", confirmer{cause: links.NoLink}, 1300 * time.Millisecond, 0, 1300 * time.Millisecond, 0},
		{"by a list at a time", confirmer{cause: links.TooRecent}, 0, 700 * time.Millisecond, 700 * time.Millisecond, 1},
		{"by a list at once", confirmer{cause: links.TooRecent}, 0, -time.Hour, 1, 1},
		{"never", confirmer{cause: links.PodTooOld}, 0, 0, 0, 1},
		{"by a list that comes too late", confirmer{cause: links.TooRecent}, 0, time.Hour, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n, start := newTestFinder(nmitest.Pod("a", "1", address.String())), time.Now()
				n.listed = func() ([]*corev1.Pod, error) {
					return []*corev1.Pod{nmitest.Pod("a", "1", address.String())}, nil
				}
				refuse := c.refuse
				if c.listAt != 0 {
					refuse.listAt = start.Add(c.listAt)
				}
				if c.after != 0 {
					refuse.until = start.Add(c.after)
					time.AfterFunc(c.after, n.Recheck)
				}
				pod, err := n.FindByAddress(t.Context(), address, &refuse)
				var unconfirmed *UnconfirmedError
				switch took := time.Since(start); {
				case c.want == 0:
					if !errors.As(err, &unconfirmed) || unconfirmed.Pod.Name != "a" || unconfirmed.Reason.Cause != refuse.cause || took != 5*time.Second {
						t.Errorf("%v, %v after %s", pod, err, took)
					}
				case err != nil || pod.Name != "a" || took != max(c.want, 1)-map[bool]time.Duration{true: 1}[c.want == 1]:
					t.Errorf("%v, %v after %s", pod, err, took)
				}
				if got := n.lists.Load(); got != c.lists {
					t.Errorf("%d lists", got)
				}
			})
		})
	}
}

// Concurrent requests share a list. One that started too early for a request confirms nothing for it.
func TestAListThatStartedTooEarlyIsRepeated(t *testing.T) {
	address := netip.MustParseAddr("10.0.0.1")
	synctest.Test(t, func(t *testing.T) {
		n, start := newTestFinder(nmitest.Pod("a", "1", address.String())), time.Now()
		n.listed = func() ([]*corev1.Pod, error) {
			time.Sleep(500 * time.Millisecond)
			return []*corev1.Pod{nmitest.Pod("a", "1", address.String())}, nil
		}
		other := make(chan error)
		go func() { // lists after 2.5 s, for 0.5 s
			_, err := n.FindByAddress(context.Background(), netip.MustParseAddr("10.0.0.9"), nil)
			other <- err
		}()
		time.Sleep(time.Second)
		pod, err := n.FindByAddress(t.Context(), address, &confirmer{cause: links.TooRecent, listAt: start.Add(2600 * time.Millisecond)})
		if err != nil || pod.Name != "a" || n.lists.Load() != 2 || time.Since(start) != 4*time.Second {
			t.Errorf("%v, %v, %d lists, after %s", pod, err, n.lists.Load(), time.Since(start))
		}
		<-other
	})
}

// confirmerOf refuses pods by UID.
type confirmerOf map[string]links.Cause

func (c confirmerOf) Confirm(claim links.Claim) *links.Unconfirmed {
	if cause, refused := c[claim.UID]; refused && (cause != links.TooRecent || claim.Read.IsZero()) {
		return &links.Unconfirmed{Cause: cause}
	}
	return nil
}

// The kubelet can report the new address of a pod before it reports that another pod has lost this address.
func TestOfSeveralPodsWithOneAddressTheNewestIsFound(t *testing.T) {
	address := netip.MustParseAddr("10.0.0.1")
	for _, c := range []struct {
		name   string
		refuse confirmerOf // pods a and b have the UIDs 1 and 2
		want   string      // "": ambiguous
	}{
		{"the other started before the link", confirmerOf{"1": links.PodTooOld}, "b"},
		{"the other is newer than the link", confirmerOf{"2": links.LinkTooOld}, "a"},
		{"both started after the link", confirmerOf{}, ""},
		{"both started before the link", confirmerOf{"1": links.PodTooOld, "2": links.PodTooOld}, ""},
		{"the other has not started", confirmerOf{"1": links.NotStarted}, ""},
		{"the other may have started after the link", confirmerOf{"1": links.TooRecent}, ""},
		{"only a list could decide", confirmerOf{"1": links.PodTooOld, "2": links.TooRecent}, ""},
		{"the link behind the address is unknown", confirmerOf{"1": links.NoLink, "2": links.NoLink}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pods := func() []*corev1.Pod {
					return []*corev1.Pod{nmitest.Pod("a", "1", address.String()), nmitest.Pod("b", "2", address.String())}
				}
				n := newTestFinder(pods()...)
				n.listed = func() ([]*corev1.Pod, error) { return pods(), nil }
				pod, err := n.FindByAddress(t.Context(), address, c.refuse)
				if c.want == "" {
					if !errors.Is(err, ErrPodAmbiguous) {
						t.Errorf("%v, %v; want ErrPodAmbiguous", pod, err)
					}
				} else if err != nil || pod.Name != c.want {
					t.Errorf("%v, %v; want pod %s", pod, err, c.want)
				}
			})
		})
	}
}
