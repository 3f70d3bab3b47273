"""The look of the page, added to what all pages of the project have in common."""

STYLE = """
html{scroll-padding-top:48px}
h2 span,h4 span,figcaption span{font-weight:400;color:#52606d;font-size:13px;margin-left:6px}
h4{font-size:13px;margin:14px 0 8px;font-weight:600}
h5{font-size:14px;margin:0 0 8px;font-weight:600;line-height:1.35;overflow-wrap:anywhere}
i{font-style:normal;color:#616e7c;font-size:12px}
nav{position:sticky;top:0;z-index:2;display:flex;gap:4px 18px;overflow-x:auto;background:#f7f7f5;padding:10px 0;
border-bottom:1px solid #e4e4e0;margin-top:14px;font-size:14px;white-space:nowrap}
a{color:#1d4ed8}
nav a{text-decoration:none}
nav a:hover,nav a:focus{text-decoration:underline}
.links{margin:0 0 6px;font-size:13px}
.links div{display:flex;gap:10px;margin-top:3px}
.links dt{color:#52606d;min-width:70px}
.links dd{margin:0;overflow-wrap:anywhere}
.curves{display:grid;grid-auto-flow:dense;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:14px}
.curves figcaption{font-size:15px}
.wide{grid-column:span 2}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(280px,100%),1fr));gap:8px 22px}
.chart{min-width:0}
.chart h4{margin:0 0 4px}
.chart>svg{max-width:520px}
.chart>svg text{font-size:11px;fill:#52606d}
.grid{stroke:#e9e9e6}
.legend{list-style:none;margin:4px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px}
.legend svg{width:26px;height:10px;display:inline-block;vertical-align:middle;margin-right:5px}
.legend b{font-variant-numeric:tabular-nums}
td b{color:#047857;font-weight:700}
thead th{position:sticky;top:0}
.group{text-align:center;border-left:1px solid #e4e4e0}
tfoot td{color:#52606d;border-bottom:0;border-top:1px solid #e4e4e0;background:#fbfbfa}
.scroll{max-height:70vh;overflow:auto}
.files{margin:0;padding:0;list-style:none}
.failures{list-style:none;margin:0;padding:0}
.failures li{background:#fff;border:1px solid #e4e4e0;border-left:4px solid #b42318;border-radius:10px;
padding:10px 14px;margin-top:8px;overflow-wrap:anywhere}
.failed,.failed td{color:#b42318}
.cause{min-width:240px;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:12px}
.card{background:#fff;border:1px solid #e4e4e0;border-left:4px solid #9aa5b1;border-radius:10px;padding:12px 14px;
min-width:0}
.card.right{border-left-color:#047857}
.card.wrong{border-left-color:#b42318}
.broad{grid-template-columns:repeat(auto-fill,minmax(min(520px,100%),1fr))}
.maps{grid-template-columns:minmax(0,1fr)}
h5 b{float:right;font-weight:600;font-size:12px;border-radius:9px;padding:0 9px;margin-left:8px;color:#047857;
background:#e6f4ee}
.wrong h5 b{color:#b42318;background:#fdecea}
.pictures{display:flex;flex-wrap:wrap;gap:10px;align-items:flex-start}
.pictures figure{border:0;padding:0;border-radius:0;max-width:100%}
.pictures figcaption{font-weight:400;font-size:12px;line-height:1.3;color:#52606d;margin:4px 0 0;
overflow-wrap:anywhere}
.pictures img{width:100%;height:auto;display:block;border-radius:5px;background:#f3f3f1}
.none{font-size:12px;color:#616e7c;margin:0;align-self:center}
dl{margin:0}
.one{display:grid;grid-template-columns:auto minmax(0,1fr);gap:0 16px;align-content:start}
.one h5{grid-column:1/-1}
.card:not(.one) dl{margin-top:10px}
.card dl{font-size:13px}
.card dl div{display:flex;gap:10px;margin-top:2px}
.card dt{color:#616e7c;flex:0 0 auto;min-width:64px}
.card.one dt{min-width:44px}
.card dd{margin:0;min-width:0;overflow-wrap:anywhere}
@media (max-width:760px){main{padding:20px 12px 48px}.wide{grid-column:auto}th,td{padding:6px 9px}}
@media print{nav{display:none}.scroll{max-height:none;overflow:visible}}
"""
