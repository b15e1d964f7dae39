// Package cluster holds what MIC needs to know of the Kubernetes cluster, computes which AzureAssignedIdentity
// objects a pod should have, and writes these objects.
//
// The caches are informers of client-go with small objects of our own types. The cache of controller-runtime keeps
// objects in their Kubernetes types: even a trimmed Pod takes ten times the memory, for every pod of the cluster that
// a binding could select. Objects in the caches are shared and must not be changed.
//
// The reconcile of a pod must see the writes that earlier reconciles of the pod sent, even if the watch has not
// delivered them yet. Otherwise it sends the same create again, or writes an old status. [Cluster.AssignmentsOf]
// therefore returns the object from the response to a write until the watch delivers this object, for at most WriteTTL.
// Package k8s.io/apimachinery/pkg/util/resourceversion compares the resourceVersions. client-go and controller-runtime
// have similar types, but MIC uses neither of them:
//
//   - cache.MutationCache of client-go keeps a bounded number of writes and drops the oldest. A burst of pods can
//     exceed the bound, and a reconcile would then not see earlier writes. With a bound above any burst, each lookup by
//     index would go over all pending writes of the cluster. MutationCache does not know that an object is gone once
//     its last finalizer is removed. It cannot tell whether the watch has yet to deliver writes for one pod. MIC must
//     know this, to reconcile the pod once more.
//   - The client of controller-runtime with EnableReadYourWritesConsistency blocks a read until its cache has the
//     write, and a list until its cache has all writes of that kind. A worker would wait for the watch, and every pod
//     for the writes of all other pods. AssignmentsOf does not wait. This client also needs the cache of
//     controller-runtime.
//
// What the package protects against: acting on old state. If a watch is disconnected or has not caught up yet, the
// cache may lack a new pod. [Cluster.Behind] reports this state, and MIC then detaches nothing, except for an
// uninstall.
package cluster
