// Package credentials gets the credentials that prove an identity to Entra ID: the Secrets that AzureIdentities name
// and the ServiceAccount tokens of pods. It also builds the principals that tokens are fetched and cached for.
//
// It protects against the use of credentials that were changed or deleted, and against their use for pods that may not
// use them.
// NMI watches each Secret separately and only while a pod uses it, so NMI needs no permission for other Secrets. A
// change of a Secret makes a new principal; tokens of the old principal are dropped. A ServiceAccount token is bound to
// one pod by name and UID.
package credentials
