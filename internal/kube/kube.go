// Package kube is the way to the API server, for NMI and MIC alike.
package kube

import (
	"fmt"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Config says where the API server is and who asks it: as the file says, or with the account of the pod if none is named.
func Config(kubeconfig, userAgent string) (*rest.Config, error) {
	find := rest.InClusterConfig
	if kubeconfig != "" {
		find = func() (*rest.Config, error) { return clientcmd.BuildConfigFromFlags("", kubeconfig) }
	}
	config, err := find()
	if err != nil {
		return nil, fmt.Errorf("finding the API server: %w; run this in a pod, or give --kubeconfig", err)
	}
	config.UserAgent = userAgent
	return config, nil
}

// Client asks for the resources of one group, below /api or /apis, with a scheme that need not know any other: a client
// for all of Kubernetes would take several times the memory.
func Client(config *rest.Config, scheme *runtime.Scheme, gv schema.GroupVersion, path, contentType string) (rest.Interface, error) {
	c := rest.CopyConfig(config)
	c.GroupVersion, c.APIPath = &gv, path
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	c.ContentType, c.AcceptContentTypes = contentType, contentType+","+runtime.ContentTypeJSON
	return rest.RESTClientFor(c)
}
