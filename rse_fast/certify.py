import torch, copy
from bench import ensemble, networks, peers
from bench.measure import *
w=torch.device("cpu")
for kind,b,n in (("VGG16",1,10),("VGG16",8,10),("SmallNet",8,1),("SmallNet",8,10),("ResNeXt29",2,10),("ResNet-50",1,4)):
    plain=networks.plain(kind,w); x=networks.images(b,networks.KINDS[kind][1],w)
    r=ensemble.Reference(plain,x,n); print(kind,b,n,"chance",float(r.chance),"rounding",float(r.rounding), "calm dist", float(ensemble.distance(r.calm,r.mean)))
    for s in (1,2,.5):
        e=peers.eager_rse(plain,.2*s,.1*s)
        res=peers.packed(e,x,n); print("   sigma x",s, float(ensemble.distance(res,r.mean)))
