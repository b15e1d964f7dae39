package azure

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

var apiVersions = []string{
	"2017-03-01", "2017-04-02", "2017-08-01", "2017-12-01", "2018-02-01", "2018-04-02", "2018-10-01",
	"2019-02-01", "2019-03-11", "2019-04-30", "2019-06-01", "2019-06-04", "2019-08-01", "2019-08-15", "2019-11-01",
	"2020-06-01", "2020-07-15", "2020-09-01", "2020-10-01", "2020-12-01",
	"2021-01-01", "2021-02-01", "2021-03-01", "2021-05-01", "2021-10-01", "2021-11-01", "2021-11-15", "2021-12-13",
	"2023-07-01", "2023-11-15", "2025-04-07",
}

var loadBalancer = map[string]any{"loadbalancer": map[string]any{
	"publicIpAddresses": []any{}, "inboundRules": []any{}, "outboundRules": []any{},
}}

// instanceDocument is the instance metadata of a virtual machine. All leaves are
// strings.
func instanceDocument(n Node) map[string]any {
	m := n.instance()
	address := ""
	for _, p := range n.Sources {
		if p.IsSingleIP() {
			address = p.Addr().String()
			break
		}
	}
	sum := sha256.Sum256([]byte(m.resourceID))
	return map[string]any{
		"compute": map[string]any{
			"azEnvironment": "AzurePublicCloud", "location": "westeurope", "name": m.name,
			"offer": "", "osType": "Linux", "placementGroupId": "", "platformFaultDomain": "0",
			"platformUpdateDomain": "0", "provider": "Microsoft.Compute", "publisher": "",
			"resourceGroupName": m.resourceGroup, "resourceId": m.resourceID, "sku": "",
			"subscriptionId": m.subscription, "tags": "", "tagsList": []any{},
			"userData": "ZmFrZSB1c2VyIGRhdGE=", "version": "", "vmId": fmt.Sprintf("%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16]),
			"vmScaleSetName": m.scaleSet, "vmSize": "Standard_D2s_v5", "zone": "1",
			"osProfile": map[string]any{"adminUsername": "azureuser", "computerName": n.Name},
		},
		"network": map[string]any{"interface": []any{map[string]any{
			"ipv4": map[string]any{
				"ipAddress": []any{map[string]any{"privateIpAddress": address, "publicIpAddress": ""}},
				"subnet":    []any{map[string]any{"address": "10.224.0.0", "prefix": "16"}},
			},
			"ipv6":       map[string]any{"ipAddress": []any{}},
			"macAddress": "000D3A000001",
		}}},
	}
}

// instance returns the document or the part of it that the route selects. For a
// leaf, the request must have format=text. For a branch, format=text returns the list
// of its keys.
func (m *imds) instance(x *requestContext, n Node, route, format string) response {
	var node any = instanceDocument(n)
	for _, step := range strings.Split(strings.Trim(route, "/"), "/") {
		if step == "" {
			continue
		}
		var ok bool
		if node, ok = child(node, step); !ok {
			x.entry.Error = "no such route in the instance document"
			return withServerHeader(jsonResponse(http.StatusNotFound, map[string]string{"error": "Not found"}))
		}
	}
	text := strings.EqualFold(format, "text")
	switch v := node.(type) {
	case string:
		if !text {
			return badInstanceRequest(x, "Requested resource is a leaf; specify format=text")
		}
		return withServerHeader(textResponse(200, v))
	case map[string]any:
		if text {
			return withServerHeader(textResponse(200, listing(slices.Sorted(maps.Keys(v)), func(key string) any { return v[key] })))
		}
	case []any:
		if text {
			keys := make([]string, len(v))
			for i := range v {
				keys[i] = strconv.Itoa(i)
			}
			return withServerHeader(textResponse(200, listing(keys, func(key string) any { c, _ := child(v, key); return c })))
		}
	}
	return withServerHeader(jsonResponse(200, node))
}

func child(node any, step string) (any, bool) {
	switch v := node.(type) {
	case map[string]any:
		for key, c := range v {
			if strings.EqualFold(key, step) {
				return c, true
			}
		}
	case []any:
		if i, err := strconv.Atoi(step); err == nil && i >= 0 && i < len(v) {
			return v[i], true
		}
	}
	return nil, false
}

func listing(keys []string, value func(string) any) string {
	lines := make([]string, len(keys))
	for i, key := range keys {
		lines[i] = key
		if _, leaf := value(key).(string); !leaf {
			lines[i] += "/"
		}
	}
	return strings.Join(lines, "\n")
}
