package links

import (
	"net/netip"
	"time"
)

// reportTime is how long after the creation of a link the kubelet may take to report that a pod has lost the address.
const reportTime = 2 * time.Second

// Claim is the statement of the API server that a pod has an address.
type Claim struct {
	Address netip.Addr
	UID     string
	// Interface is the index of the network interface on which the connection was opened, -1 if that is unknown. 0 means
	// that it does not matter.
	Interface int
	// Acknowledged is when the kubelet acknowledged the pod, in seconds; zero if that is unknown.
	Acknowledged time.Time
	// Started is when the newest container of the pod started, in seconds; zero if the kubelet has reported none.
	Started time.Time
	// Read is when the list that has this statement started. It is zero for a statement of a watch, which can be late.
	Read time.Time
}

// Cause says why an address is not confirmed. It is a metric label.
type Cause string

// Values of Cause.
const (
	NotWatching Cause = "not_watching" // the table is not up to date
	NoLink      Cause = "no_link"      // no link of a pod is behind the address
	OtherLink   Cause = "other_link"   // the connection was opened on another interface, or on one that is unknown
	SharedLink  Cause = "shared_link"  // the link has too many addresses to be that of one pod
	Claimed     Cause = "claimed"      // the address moved although its link exists
	LinkTooOld  Cause = "link_too_old" // the link is older than the pod
	PodTooOld   Cause = "pod_too_old"  // no container of the pod started after the link was created
	NotStarted  Cause = "not_started"  // the kubelet has reported no start of a container
	TooRecent   Cause = "too_recent"   // the order of link and container is unknown; a list decides
)

// Unconfirmed says why an address is not confirmed.
type Unconfirmed struct {
	Cause Cause
	// ListAt is the time from which on a list of the pods can confirm the address; zero if a list does not help.
	ListAt time.Time
	text   string
}

// String explains the cause.
func (u *Unconfirmed) String() string { return u.text }

// creation is when a link was created, after From and not after To. Both are times since the boot of the node.
type creation struct {
	From, To time.Duration
	// Offset is the time since 1970 at which the node booted, by the clock of the time at which the link was found. It
	// differs from the current one if the clock of the node was set since.
	Offset time.Duration
}

// check compares a claim with the creation of the link behind its address. offset is the current value of creation.Offset.
func (c creation) check(claim Claim, offset time.Duration) *Unconfirmed {
	// If the clock was set, the kubelet may have used the old or the new one. Then only what holds for both is certain.
	from := time.Unix(0, int64(c.From+min(c.Offset, offset)))
	to := time.Unix(0, int64(c.To+max(c.Offset, offset)))
	listAt := time.Unix(0, int64(c.To+offset)).Add(reportTime)
	switch {
	case claim.Started.IsZero():
		return &Unconfirmed{Cause: NotStarted, text: "the kubelet has not reported yet that a container of the pod started"}
	case !claim.Acknowledged.IsZero() && to.Before(claim.Acknowledged):
		return &Unconfirmed{Cause: LinkTooOld, text: "the network link behind the address is older than the pod, so it is that of another pod"}
	case !claim.Started.Before(to):
		return nil
	case !claim.Started.Add(time.Second).After(from):
		return &Unconfirmed{Cause: PodTooOld, text: "no container of the pod is known to have started after the network link behind the address was created; the address may be that of another pod by now"}
	case !claim.Read.IsZero() && !claim.Read.Before(listAt):
		return nil
	}
	return &Unconfirmed{Cause: TooRecent, ListAt: listAt, text: "the network link behind the address and the containers of the pod are of the same time, and the API server has not confirmed since that the pod has the address"}
}
