package telemetry

import "github.com/podidentity/podidentity/internal/metric"

// durationBuckets start at 0.2 ms, because most requests for a cached token take tenths of a millisecond. A request can
// take seconds if NMI has to wait for the pod to be known, for an assignment, or for Azure.
var durationBuckets = []float64{.0002, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}

// The definitions of all metrics. A metric whose name begins with aadpodidentity has the name and the meaning that it
// has in AAD Pod Identity. Only the labels differ, because no label holds a text that a client chooses: the label
// operation_type of a request is one of a few routes instead of the path, and there is no label for the resource.
var (
	requestDuration = metric.Definition{Name: "aadpodidentity_nmi_operations_duration_seconds", Type: metric.Histogram, Buckets: durationBuckets,
		Help:   "Time to respond to a request of a pod, by route and HTTP status.",
		Labels: []string{"operation_type", "status_code"},
		Values: map[string][]string{"operation_type": {"token", "host_token", "info", "instance", "versions", "loadbalancer", "attested", "scheduledevents", "unknown"}}}
	imdsDuration = metric.Definition{Name: "aadpodidentity_imds_operations_duration_seconds", Type: metric.Histogram, Buckets: durationBuckets,
		Help: "Time to fetch a token from IMDS, retries included.", Labels: []string{"operation_type"},
		Values: map[string][]string{"operation_type": {"managed_identity"}}}
	imdsErrors = metric.Definition{Name: "aadpodidentity_imds_operations_errors_count", Type: metric.Counter,
		Help: "Token fetches from IMDS that failed.", Labels: []string{"operation_type"},
		Values: map[string][]string{"operation_type": {"managed_identity"}}}
	apiErrors = metric.Definition{Name: "aadpodidentity_kubernetes_api_operations_errors_count", Type: metric.Counter,
		Help: "Requests to the API server that failed.", Labels: []string{"operation_type"},
		Values: map[string][]string{"operation_type": {APIWatch, APIListPods, APIWriteEvent, APIRequestToken, APIReadSecret}}}

	decisions = metric.Definition{Name: "podidentity_nmi_decisions_total", Type: metric.Counter,
		Help: "Token requests by their reason code.", Labels: []string{"reason"}}
	inFlight = metric.Definition{Name: "podidentity_nmi_requests_in_flight", Type: metric.Gauge,
		Help: "Requests of pods that NMI is processing."}
	cacheRequests = metric.Definition{Name: "podidentity_nmi_token_cache_requests_total", Type: metric.Counter,
		Help:   "Requests to the token cache by result: hit, fetched, shared (waited for the fetch of another request), failed (a recent failure is cached, or the pod is throttled).",
		Labels: []string{"result"}, Values: map[string][]string{"result": {"hit", "fetched", "shared", "failed"}}}
	cacheEntries = metric.Definition{Name: "podidentity_nmi_token_cache_entries", Type: metric.Gauge,
		Help: "Keys in the token cache."}
	upstreamRequests = metric.Definition{Name: "podidentity_nmi_upstream_requests_total", Type: metric.Counter,
		Help: "Token fetches by source and outcome.", Labels: []string{"source", "outcome"},
		Values: map[string][]string{"source": {"managed_identity", "secret", "certificate", "federated"}, "outcome": {"ok", "refused", "throttled", "unavailable"}}}
	upstreamDuration = metric.Definition{Name: "podidentity_nmi_upstream_duration_seconds", Type: metric.Histogram, Buckets: durationBuckets,
		Help: "Time to fetch a token from its source, retries included.", Labels: []string{"source"},
		Values: map[string][]string{"source": {"managed_identity", "secret", "certificate", "federated"}}}
	repairs = metric.Definition{Name: "podidentity_nmi_iptables_repairs_total", Type: metric.Counter,
		Help: "Parts of the capture that NMI found missing or changed, and repaired.", Labels: []string{"what"}}
	syncErrors = metric.Definition{Name: "podidentity_nmi_iptables_sync_errors_total", Type: metric.Counter,
		Help: "Checks of the iptables rules that failed."}
	podLookups = metric.Definition{Name: "podidentity_nmi_pod_lookup_duration_seconds", Type: metric.Histogram, Buckets: durationBuckets,
		Help: "Time to find the pod of a request."}
	refusedConnections = metric.Definition{Name: "podidentity_nmi_connections_refused_total", Type: metric.Counter,
		Help: "Connections that NMI closed at once because their source, or all sources together, had too many."}
	unidentifiedConnections = metric.Definition{Name: "podidentity_nmi_connections_unidentified_total", Type: metric.Counter,
		Help: "Connections to nmi.bpfPort that NMI closed because it could not identify the pod."}
	movedAddresses = metric.Definition{Name: "podidentity_nmi_moved_addresses_total", Type: metric.Counter,
		Help: "Token requests of a pod, identified by its cgroup, from an address that the API server does not report as its own."}
	unconfirmedAddresses = metric.Definition{Name: "podidentity_nmi_unconfirmed_addresses_total", Type: metric.Counter,
		Help:   "Token requests that NMI refused because it could not confirm the pod behind their address, by cause. [Causes of an unconfirmed address](../troubleshooting.md#causes-of-an-unconfirmed-address) explains them.",
		Labels: []string{"cause"}, Values: map[string][]string{"cause": {"not_watching", "no_link", "other_link", "shared_link", "claimed", "link_too_old", "pod_too_old", "not_started", "too_recent"}}}
	captures = metric.Definition{Name: "podidentity_nmi_captures", Type: metric.Gauge,
		Help: "1 if NMI captures the requests of pods in this way, 0 if it does not: iptables rules, or eBPF programs (bpf). The log says why not, unless it was chosen.", Labels: []string{"kind"},
		Values: map[string][]string{"kind": {"iptables", "bpf"}}}
	staleWatches = metric.Definition{Name: "podidentity_nmi_stale_watches", Type: metric.Gauge,
		Help: "Watches that are disconnected from the API server or have not caught up yet."}
	assignmentWaits = metric.Definition{Name: "podidentity_nmi_assignment_wait_seconds", Type: metric.Histogram,
		Buckets: []float64{.01, .05, .1, .25, .5, 1, 2.5, 5, 10, 15, 20, 30, 60},
		Help:    "Standard mode: time that requests waited for the assignment of their identity, by outcome: assigned, timeout, refused, gone (the client closed the connection).",
		Labels:  []string{"outcome"}, Values: map[string][]string{"outcome": {"assigned", "timeout", "refused", "gone"}}}
)

// Definitions returns the definitions of all metrics, for the reference documentation.
func Definitions() []metric.Definition {
	return []metric.Definition{
		requestDuration, imdsDuration, imdsErrors, apiErrors,
		decisions, inFlight, cacheRequests, cacheEntries, upstreamRequests, upstreamDuration,
		repairs, syncErrors, podLookups, refusedConnections, unidentifiedConnections, movedAddresses, unconfirmedAddresses, captures, staleWatches, assignmentWaits,
	}
}
